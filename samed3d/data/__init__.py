"""Where training images come from: generated volumes now, a corpus on disk later."""
