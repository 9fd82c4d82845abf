"""What ``--help`` says: a text file a command in ``configs/help``, and the names that there are."""

from ldm.cli.settings import configs


def help_of(command: str) -> str:
    """The help of a command, or of ``ldm`` itself."""
    text = (configs() / "help" / f"{command}.txt").read_text(encoding="utf-8")
    if command == "train":
        root = configs() / "experiment"
        names = sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))
        return text.format(experiments=" ".join(names))
    if command == "sample":
        from ldm.diffusion import GRIDS, SAMPLERS
        from ldm.loading import BUNDLED

        names = [*SAMPLERS, "auto"]
        lines = {"samplers_1": " ".join(names[:9]), "samplers_2": " ".join(names[9:])}
        return text.format(models=" ".join(BUNDLED), grids=" ".join(GRIDS), **lines)
    return text
