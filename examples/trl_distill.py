"""Distillation on the soft targets of a dataset: the plain TRL script examples/trl_sft.py with seven lines changed.

M=runs/demo/student-before; python examples/trl_distill.py --model_name_or_path $M --dataset_name runs/demo/curated --alpha 0.9
"""

from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from llmdistill import DistillConfig, DistillTrainer, load_dataset


def main():
    """Train the model and save it."""
    parser = TrlParser((ScriptArguments, DistillConfig, ModelConfig))
    script, training, model = parser.parse_args_and_config()
    trainer = DistillTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=load_dataset(script.dataset_name, split=script.dataset_train_split),
        peft_config=get_peft_config(model),
    )
    trainer.train()
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main()
