"""Words for people."""

from clustermim.training.progress import TrainingProgress, duration


def test_duration():
    assert duration(float("nan")) == "?"
    assert duration(42.4) == "42 s"
    assert duration(190) == "3 min 10 s"
    assert duration(7500) == "2 h 05 min"


def test_a_log_file_gets_one_line_at_the_end(capsys):
    with TrainingProgress(3, "pretrain") as progress:
        for step in (1, 2, 3):
            progress.update(step, loss=1.0 / step, images_per_second=1234.0, extra=" · accuracy 0.5")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "step 3 of 3" in said
    assert "1,234 images/s" in said
    with TrainingProgress(3, "pretrain", show=False) as progress:
        progress.update(3, loss=1.0, images_per_second=1.0)
        progress.say("unheard")
    assert capsys.readouterr().err == ""
