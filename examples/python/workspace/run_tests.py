"""Run the tests, and leave their results as JUnit XML in ARTIFACT_DIR.

The standard library alone, so that any Python image will do.
"""

import os
import sys
import time
import unittest
from pathlib import Path
from xml.etree import ElementTree


class RecordingResult(unittest.TextTestResult):
    """Keeps every test's time and failure beside showing them."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.suite = ElementTree.Element("testsuite", name="python")

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.began = time.perf_counter()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        _, _, name = test.id().rpartition(".")
        case = ElementTree.SubElement(
            self.suite,
            "testcase",
            classname=type(test).__qualname__,
            name=name,
            time=f"{time.perf_counter() - self.began:.3f}",
        )
        for kind, found in (("failure", self.failures), ("error", self.errors)):
            for failed, trace in found:
                if failed is test:
                    ElementTree.SubElement(case, kind).text = trace


def main() -> int:
    suite = unittest.defaultTestLoader.discover("tests", top_level_dir=".")
    result = unittest.TextTestRunner(
        stream=sys.stdout, verbosity=2, resultclass=RecordingResult
    ).run(suite)
    root = result.suite
    root.set("tests", str(result.testsRun))
    root.set("failures", str(len(result.failures)))
    root.set("errors", str(len(result.errors)))
    folder = Path(os.environ.get("ARTIFACT_DIR", "."))
    ElementTree.ElementTree(root).write(
        folder / "junit.xml", encoding="utf-8", xml_declaration=True
    )
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
