"""`accelerate launch tools/finetune.py run=DIR fraction=0.1 [overrides]`: few labels (configs/finetune.yaml)."""

from cpc.finetune import main

if __name__ == "__main__":
    main()
