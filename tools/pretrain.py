"""`accelerate launch tools/pretrain.py method=NAME [overrides]`: pre-train by any method (configs/pretrain.yaml)."""

from cpc.pretrain import main_of_any_method

if __name__ == "__main__":
    main_of_any_method()
