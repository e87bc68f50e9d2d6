def test_import_hook_is_on():
    import clustermim.errors as errors

    assert errors.nearest("pixl", ["pixel", "hog"]) == " Did you mean 'pixel'? Known: hog, pixel."
