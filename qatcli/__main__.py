"""The `qat` command, also as `python -m qatcli`, which is what `torchrun -m qatcli` starts."""

from qatcli.interrupts import install

install()  # before the imports, which take a moment

from qatcli.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
