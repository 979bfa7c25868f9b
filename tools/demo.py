"""`make demo`: pre-train on the bundled digits and show what came out (configs/pretrain_cpc.yaml)."""

from cpc.demo import main

if __name__ == "__main__":
    main()
