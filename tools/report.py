"""One HTML file about a run that opens without a network: report.html in the run's folder.

python tools/report.py run=outputs/demo
"""

from mtl_rcnn.console import report

if __name__ == "__main__":
    report()
