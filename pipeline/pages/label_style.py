"""Hold the style of the page, and the script that makes keys press its buttons."""

CSS = """
.gradio-container { max-width: 1000px !important; margin: 0 auto; padding: 20px 16px 8px !important; }
.gradio-container .app { max-width: none !important; padding: 0 !important; }
.gradio-container .html-container { padding: 0 !important; }
footer, #ticket { display: none !important; }
.spine-title { display: flex; align-items: baseline; gap: 12px; flex-wrap: wrap; }
.spine-title h1 { font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; margin: 0; }
.spine-bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.spine-bar > div { height: 100%; border-radius: 3px; background: var(--color-accent); transition: width .3s; }
.spine-figures { display: flex; flex-wrap: wrap; gap: 2px 20px; margin-top: 8px; font-size: .875rem;
  color: var(--body-text-color-subdued); }
.spine-figures b { color: var(--body-text-color); font-weight: 600; font-variant-numeric: tabular-nums; }
.spine-card { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 14px 18px 18px;
  background: var(--block-background-fill); box-shadow: 0 1px 2px rgb(0 0 0 / .05); }
.spine-card h2 { display: flex; align-items: center; justify-content: space-between; margin: 0 0 8px; font-size: .75rem;
  font-weight: 600; letter-spacing: .06em; text-transform: uppercase; color: var(--body-text-color-subdued); }
.spine-prompt { background: none; box-shadow: none; }
.spine-dots { color: var(--body-text-color-subdued); }
.spine-sides { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 16px; }
.spine-side { min-height: 7rem; }
.spine-text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font-size: 1.0625rem; line-height: 1.6;
  color: var(--body-text-color); }
.spine-turn + .spine-turn { margin-top: 12px; }
.spine-turn[data-role="assistant"] { border-left: 3px solid var(--color-accent); padding-left: 12px; }
.spine-role { font-size: .75rem; font-weight: 600; color: var(--body-text-color-subdued); }
.spine-message { text-align: center; padding: 40px 20px; }
.spine-message h2 { justify-content: center; font-size: 1.05rem; text-transform: none; letter-spacing: 0;
  color: var(--body-text-color); }
.spine-message .spine-text { color: var(--body-text-color-subdued); font-size: 1rem; }
kbd, #first::before, #tie::before, #second::before, #skip::before, #undo::before { display: inline-block; min-width: 1.6em;
  padding: 0 .4em; border: 1px solid currentColor; border-radius: 5px; font: 600 .75rem/1.6em ui-monospace, monospace;
  text-align: center; opacity: .65; text-transform: none; letter-spacing: 0; }
#first::before { content: "1"; } #second::before { content: "2"; } #tie::before { content: "t"; }
#skip::before { content: "s"; } #undo::before { content: "u"; }
#first, #tie, #second { min-height: 52px; font-weight: 600; gap: 8px; }
#skip, #undo { gap: 8px; }
#guidelines { padding: 8px 16px; border: 1px solid var(--border-color-primary); border-radius: 12px; }
#name textarea, #name input { border: 1px solid var(--border-color-primary); }
#answers { position: sticky; bottom: 0; z-index: 5; padding: 10px 0; background: var(--body-background-fill); }
#said { min-height: 1.5rem; font-size: .875rem; color: var(--body-text-color-subdued); }
#who { max-width: 420px; margin: 8vh auto 0; }
#rest .form { border: 0; background: none; box-shadow: none; }
#sure { padding: 0; border: 0; background: none; }
#sure [data-testid="block-info"], #name [data-testid="block-info"] {
  padding: 0; background: none; font-size: .875rem; font-weight: 500;
  color: var(--body-text-color-subdued); }
#rest { align-items: flex-end; }
@media (pointer: coarse), (max-width: 700px) {
  kbd, #first::before, #tie::before, #second::before, #skip::before, #undo::before { display: none; }
}
@media (max-width: 700px) {
  .spine-sides { grid-template-columns: 1fr; gap: 12px; margin-top: 12px; }
  .spine-side { min-height: 0; }
  .spine-card { padding: 12px 14px 14px; }
  #guidelines { order: 9; }
}
"""

# A key presses the button that it names, unless somebody writes in a field.
HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  const buttons = {"1": "first", "2": "second", t: "tie", s: "skip", u: "undo"};
  const sure = {g: 0, f: 1, c: 2};
  const key = event.key.toLowerCase();
  const writes = event.target.closest("textarea, [contenteditable], input:not([type=radio])");
  if (writes || event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  const target = key in buttons ? document.getElementById(buttons[key])
    : key in sure ? document.querySelectorAll("#sure input")[sure[key]] : null;
  if (target && !target.disabled && target.getClientRects().length) {
    event.preventDefault();
    target.click();
  }
});
</script>
"""
