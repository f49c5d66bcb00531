from mmsae.report.tables import markdown_table, text_table


def test_text_is_aligned():
    rows = [["a", 0.12345, None], ["long", 1.0, 3]]
    assert text_table(rows, ["name", "x", "n"]) == "name  x      n\na     0.123  -\nlong  1.000  3"


def test_markdown():
    said = markdown_table(["name", "x"], [["a", 0.12345], ["b", None], ["**c**", 2]])
    assert said == "| name | x |\n|---|---|\n| a | 0.123 |\n| b | – |\n| **c** | 2 |"
    assert markdown_table(["x"], [[0.5], [None]], digits=1, none="") == "| x |\n|---|\n| 0.5 |\n|  |"
