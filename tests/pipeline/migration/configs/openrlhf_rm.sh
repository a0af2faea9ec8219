set -x

read -r -d '' training_commands <<COMMANDS
openrlhf.cli.train_rm \
   --ckpt.output_dir ./checkpoint/llama3-8b-rm \
   --ckpt.save_steps 200 \
   --logger.logging_steps 1 \
   --eval.steps -1 \
   --train.batch_size 256 \
   --train.micro_batch_size 2 \
   --model.model_name_or_path my-org/llama-3-8b-sft \
   --ds.param_dtype bf16 \
   --train.max_epochs 1 \
   --data.max_len 8192 \
   --ds.zero_stage 3 \
   --adam.lr 9e-6 \
   --data.dataset my-org/preferences \
   --data.apply_chat_template \
   --data.chosen_key chosen \
   --data.rejected_key rejected_answer \
   --ds.attn_implementation flash_attention_2 \
   --ckpt.load_enable \
   --ds.packing_samples \
   --model.gradient_checkpointing_enable
COMMANDS

if [[ ${1} != "slurm" ]]; then
    deepspeed --module $training_commands
fi
