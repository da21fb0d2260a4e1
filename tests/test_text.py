from boxwright.text import plural


def test_plural_agrees_with_the_count() -> None:
    assert plural(1, "image") == "1 image"
    assert plural(0, "image") == "0 images"
    assert plural(1234, "category", "categories") == "1,234 categories"
