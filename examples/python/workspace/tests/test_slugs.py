import unittest

from slugs import slug


class SlugTest(unittest.TestCase):
    def test_words_are_joined_by_dashes(self) -> None:
        self.assertEqual(slug("Hello, brave new World!"), "hello-brave-new-world")

    def test_accents_are_dropped(self) -> None:
        self.assertEqual(slug("Crème brûlée"), "creme-brulee")

    def test_a_title_without_letters_has_no_slug(self) -> None:
        self.assertEqual(slug("!?"), "")
