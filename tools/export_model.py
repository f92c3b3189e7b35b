"""Exports a trained network: model.ts with manifest.json and runtime.py, certified against the network itself.

python tools/export_model.py run=outputs/demo
"""

from __future__ import annotations

from omegaconf import DictConfig

from mtl_rcnn import config


@config.main("export")
def main(cfg: DictConfig) -> None:
    """Reads `configs/export.yaml` with the command line's overrides."""
    from mtl_rcnn.export.export import export_checkpoint

    export_checkpoint(cfg)


if __name__ == "__main__":
    main()
