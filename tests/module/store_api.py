"""Store the module's declared API as it is now."""

from tests.module.listing import STORED, listing

STORED.write_text(listing(), "utf-8")
