"""`python -m longrope_export`, which is `longrope`: for launchers that start a module, such as torchrun."""

from longrope_export.cli.main import main

if __name__ == "__main__":
    main()
