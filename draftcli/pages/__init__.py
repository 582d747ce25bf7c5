"""What all HTML pages share: one layout, one style, the image viewer, charts and the way numbers are written."""
