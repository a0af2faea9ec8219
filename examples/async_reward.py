r"""Ask a web service for the rewards, with all requests of a batch under way at once.

    python examples/async_reward.py &
    accelerate launch --config_file accelerate_configs/cpu.yaml -m pipeline.ppo \
        --config pipeline/recipes/hello_world/ppo.yaml --output_dir runs/async_reward \
        --reward_funcs examples.async_reward.ask

The first command is the service: a rule of one line here, a model on another machine in earnest. PPO awaits functions that
are `async`. For servers that speak OpenRLHF's or OpenAI's format there is `reward_models.remote.get_remote`.
"""

import asyncio
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen


URL = "http://localhost:8123"


async def ask(completions: list[str], **columns) -> list[float]:
    """Return the service's reward of each completion; each request has a thread of its own."""

    def post(text: str) -> float:
        with urlopen(URL, json.dumps({"text": text}).encode(), timeout=10) as answer:
            return json.load(answer)["reward"]

    return await asyncio.gather(*(asyncio.to_thread(post, text) for text in completions))


class Service(BaseHTTPRequestHandler):
    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"reward": float("world" in text)}).encode())


if __name__ == "__main__":
    ThreadingHTTPServer(("localhost", 8123), Service).serve_forever()
