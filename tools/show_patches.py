from cpc.show_patches import main

if __name__ == "__main__":
    main()
