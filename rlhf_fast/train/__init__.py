"""The thin loop: supervised fine-tuning, reward model, PPO, one story per file.

`sft.py`, `reward.py` and `ppo.py` read top to bottom; `config.py` holds every option of all stages.
"""
