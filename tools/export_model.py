"""Exports a trained network: model.ts with manifest.json and runtime.py, certified against the network itself.

python tools/export_model.py run=outputs/demo
"""

from mtl_rcnn.console import export_model

if __name__ == "__main__":
    export_model()
