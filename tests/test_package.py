def test_import_hook_is_on():
    import clustermim.errors as errors

    assert errors.nearest("pixl", ["pixel", "hog"]) == " Did you mean 'pixel'? Known: hog, pixel."


def test_every_public_name_is_there_and_lazy() -> None:
    import clustermim

    assert set(clustermim.__all__) == {"__version__", *clustermim._API}
    for name in clustermim.__all__:
        assert getattr(clustermim, name) is not None
