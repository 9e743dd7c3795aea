"""`python -m qatcli`: the `qat` command, also what `torchrun -m qatcli` starts."""

from qatcli.cli import main

if __name__ == "__main__":
    main()
