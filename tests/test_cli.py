import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Result, Vlmslice, assert_user_error
from PIL import Image
from tiny_models import noise_image

import vlmslice
from vlmslice import cli
from vlmslice.slicing import SlicingConfig, plan_slices
from vlmslice.slicing_policies import POLICIES

ROOT = Path(__file__).parents[1]


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    noise_image(100, 200).save(path)
    return path


class TestPlan:
    def test_sizes_are_width_x_height(self, vlmslice_command: Vlmslice) -> None:
        wide = vlmslice_command("plan", "4000x100")
        assert wide.code == 0
        assert wide.out.startswith("image     4000 x 100 px (width x height)\n")
        assert "1 x 27 (rows x columns)" in wide.out
        assert "27 x 1 (rows x columns)" in vlmslice_command("plan", "100x4000").out

    @pytest.mark.parametrize("size", ["640X480", "640×480", "640 x 480"])
    def test_spellings_of_a_size(self, vlmslice_command: Vlmslice, size: str) -> None:
        assert json.loads(vlmslice_command("plan", size, "--json").out)["image_size"] == [480, 640]

    def test_json_is_the_plan_of_the_model(self, vlmslice_command: Vlmslice, saved_model: Path) -> None:
        config = json.loads((saved_model / "config.json").read_text())["slicing"]
        expected = plan_slices(333, 444, SlicingConfig.from_dict(config)).to_dict()
        assert (
            json.loads(vlmslice_command("plan", "444x333", "--model", saved_model, "--json").out) == expected
        )

    def test_options(self, vlmslice_command: Vlmslice) -> None:
        plan = json.loads(vlmslice_command("plan", "640x480", "--policy", "uhd", "--json").out)
        assert plan["policy"] == "uhd"
        plan = json.loads(vlmslice_command("plan", "640x480", "--max-visual-tokens", "50", "--json").out)
        assert plan["num_visual_tokens"] <= 50

    def test_all_policies_side_by_side(self, vlmslice_command: Vlmslice) -> None:
        """As each alone, and those over the bound say so."""
        fields = json.loads(vlmslice_command("plan", "640x480", "--all", "--json").out)
        assert {*fields["plans"], *fields["errors"]} == set(POLICIES) and "uniform" in fields["plans"]
        for policy, plan in fields["plans"].items():
            alone = vlmslice_command("plan", "640x480", "--policy", policy, "--json").out
            assert plan == json.loads(alone)
        options = ("plan", "640x480", "--all", "--max-visual-tokens", "200")
        over = json.loads(vlmslice_command(*options, "--json").out)["errors"]
        assert over and all("use policy 'adaptive'" in error for error in over.values())
        result = vlmslice_command(*options)
        lines = [line.rstrip() for line in result.out.splitlines()]
        assert [line.split()[0] for line in lines[2:]] == list(POLICIES)
        assert {line.split()[0] for line in lines if line.endswith("-")} == set(over)
        assert all(f"{policy}: {error}" in result.err for policy, error in over.items())

    def test_all_policies_or_one(self, vlmslice_command: Vlmslice) -> None:
        result = vlmslice_command("plan", "640x480", "--all", "--policy", "uhd")
        assert_user_error(result, "got --policy uhd and --all; leave one of them out")

    def test_small_image(self, vlmslice_command: Vlmslice) -> None:
        assert "one view  64 x 32 px, 8 visual tokens" in vlmslice_command("plan", "60x30").out

    def test_file_is_upright_and_only_its_header_is_read(
        self, vlmslice_command: Vlmslice, tmp_path: Path
    ) -> None:
        path = tmp_path / "turned.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6
        noise_image(100, 200).save(path, exif=exif)
        path.write_bytes(path.read_bytes()[:-500])  # a part of the pixels is missing
        assert json.loads(vlmslice_command("plan", path, "--json").out)["image_size"] == [200, 100]
        stdin = vlmslice_command("plan", "-", "--json", stdin=path.read_bytes())
        assert json.loads(stdin.out)["image_size"] == [200, 100]

    def test_errors(self, vlmslice_command: Vlmslice, tmp_path: Path) -> None:
        assert_user_error(vlmslice_command("plan", "0x10"), "at least 1 px")
        assert_user_error(vlmslice_command("plan", "no.png"), "'no.png' cannot be read")
        assert_user_error(vlmslice_command("plan", "9x9", "--policy", "uhdd"), "did you mean 'uhd'?")
        assert_user_error(
            vlmslice_command("plan", "9x9", "--max-visual-tokens", "0"), "max_visual_tokens is 0"
        )
        assert_user_error(vlmslice_command("plan", "9x9", "--model", tmp_path), "config.json")
        assert_user_error(vlmslice_command("plan"), "Missing argument")


class TestAsk:
    def ask(self, run: Vlmslice, model: Path, *arguments: object, stdin: bytes = b"") -> Result:
        return run("ask", *arguments, "--model", model, "--max-new-tokens", "8", stdin=stdin)

    def test_answer_on_stdout_and_notes_on_stderr(
        self, vlmslice_command: Vlmslice, saved_model: Path, image_file: Path
    ) -> None:
        result = self.ask(vlmslice_command, saved_model, image_file, "read")
        assert result.code == 0
        assert result.out.endswith("\n")
        assert "visual tokens | load" in result.err

    def test_json_is_one_object(
        self, vlmslice_command: Vlmslice, saved_model: Path, image_file: Path
    ) -> None:
        result = self.ask(vlmslice_command, saved_model, image_file, image_file, "read", "--json")
        fields = json.loads(result.out)
        assert list(fields) == [
            "answer",
            "points",
            "plans",
            "num_visual_tokens",
            "num_new_tokens",
            "finish_reason",
            "model",
            "seconds",
        ]
        assert len(fields["plans"]) == 2
        assert fields["num_visual_tokens"] == sum(plan["num_visual_tokens"] for plan in fields["plans"])
        assert fields["num_new_tokens"] == 8
        assert list(fields["seconds"]) == ["load", "process", "first_token", "decode"]
        assert result.err == ""

    def test_file_and_stdin_alike(
        self, vlmslice_command: Vlmslice, saved_model: Path, image_file: Path
    ) -> None:
        file = self.ask(vlmslice_command, saved_model, image_file, "read", "--json")
        stdin = self.ask(vlmslice_command, saved_model, "-", "read", "--json", stdin=image_file.read_bytes())
        assert json.loads(stdin.out)["answer"] == json.loads(file.out)["answer"]

    def test_policy_and_budget(self, vlmslice_command: Vlmslice, saved_model: Path, image_file: Path) -> None:
        options = ("--policy", "uhd", "--max-visual-tokens", "40", "--json")
        fields = json.loads(self.ask(vlmslice_command, saved_model, image_file, "read", *options).out)
        assert fields["plans"][0]["policy"] == "uhd"
        assert fields["num_visual_tokens"] <= 40

    def test_slices_are_drawn(
        self, vlmslice_command: Vlmslice, saved_model: Path, image_file: Path, tmp_path: Path
    ) -> None:
        one, two = tmp_path / "one.png", tmp_path / "two.jpg"
        self.ask(vlmslice_command, saved_model, image_file, "read", "--show-slices", one)
        assert Image.open(one).width > 400
        self.ask(vlmslice_command, saved_model, image_file, image_file, "read", "--show-slices", two)
        assert not two.exists()
        assert (tmp_path / "two-1.jpg").exists() and (tmp_path / "two-2.jpg").exists()

    def test_control_characters_do_not_reach_the_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        cli._print_piece("a\x1b[2Jb\x9b\x07\tc\nd é 三")
        assert capsys.readouterr().out == "a�[2Jb��\tc\nd é 三"

    def test_errors(
        self, vlmslice_command: Vlmslice, saved_model: Path, image_file: Path, tmp_path: Path
    ) -> None:
        def fails(*arguments: object) -> Result:
            return self.ask(vlmslice_command, saved_model, *arguments)

        assert_user_error(fails("read"), "Missing argument 'IMAGE'")
        assert_user_error(fails(tmp_path / "no.png", "read"), "no.png", "No such file")
        assert_user_error(fails(__file__, "read"), "not recognised")
        assert_user_error(fails("https://example.org/a.png", "read"), "is a URL")
        assert_user_error(fails("-", "-", "read"), "can be given once")
        assert_user_error(fails("-", "read"), "0 bytes")
        assert_user_error(fails(image_file, "read", "--policy", "mini"), "did you mean 'minicpm'?")
        assert_user_error(fails(image_file, "read", "--show-slices", tmp_path / "slices.txt"), "slices.png")
        assert_user_error(fails(image_file, "read", "--show-slices", tmp_path / "no" / "a.png"), "no folder")
        assert_user_error(fails(image_file, "read", "--slices", "3"), "No such option")
        assert_user_error(vlmslice_command("ask", image_file, "read", "--model", tmp_path), "config.json")


class TestDoctor:
    def test_report(self, vlmslice_command: Vlmslice, saved_model: Path) -> None:
        result = vlmslice_command("doctor", "--model", saved_model, "--json")
        report = json.loads(result.out)
        assert result.code == bool(report["problems"])
        assert {"torch", "transformers", "timm", "vlmslice"} <= set(report["versions"])
        assert report["threads"]["torch"] >= 1
        assert report["compute"]["fp32 GFLOP/s"] > 0 and report["compute"]["bf16 GFLOP/s"] > 0
        assert len(report["model"]["model.safetensors"].split("sha256 ")[1]) == 64
        assert str(saved_model) in vlmslice_command("doctor", "--model", saved_model).out

    def test_missing_model_is_a_problem(self, vlmslice_command: Vlmslice, tmp_path: Path) -> None:
        result = vlmslice_command("doctor", "--model", tmp_path)
        assert result.code == 1
        assert "problem: model" in result.out
        assert result.err == ""


class TestCommand:
    @pytest.mark.parametrize("command", ["ask", "plan", "eval", "compose", "doctor", "runs"])
    def test_help(self, vlmslice_command: Vlmslice, command: str) -> None:
        result = vlmslice_command(command, "--help")
        assert result.code == 0
        assert f"vlmslice {command}" in result.out

    def test_nothing_is_help(self, vlmslice_command: Vlmslice) -> None:
        assert vlmslice_command() == vlmslice_command("--help")

    def test_version(self, vlmslice_command: Vlmslice) -> None:
        assert vlmslice_command("--version").out == f"vlmslice {vlmslice.__version__}\n"

    def test_unknown_command(self, vlmslice_command: Vlmslice) -> None:
        assert_user_error(vlmslice_command("plann", "9x9"), "Did you mean 'plan'?")

    def test_missing_option_of_compose(self, vlmslice_command: Vlmslice) -> None:
        assert_user_error(vlmslice_command("compose", "--vision", "x"), "Missing option")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--help"],
            ["plan", "4000x100"],
            ["ask", "--help"],
            ["eval", "--help"],
            ["doctor", "-h"],
            ["runs", "-h"],
        ],
    )
    def test_answers_without_torch(self, arguments: list[str]) -> None:
        code = (
            "import sys, vlmslice_command\n"
            f"sys.argv[1:] = {arguments!r}\n"
            "try: vlmslice_command.main()\n"
            "except SystemExit as exit: assert exit.code == 0\n"
            "print('slow:', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("slow: []\n")

    def test_reader_of_the_output_leaves(self) -> None:
        code = "import sys, vlmslice_command as c; sys.argv[1:] = ['plan', '9000x9000', '--json']; c.main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1

    def test_script(self, saved_model: Path, image_file: Path) -> None:
        script = [sys.executable, ROOT / "inference" / "ask.py", image_file, "read", "--model", saved_model]
        done = subprocess.run([*script, "--max-new-tokens", "2", "--json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["num_new_tokens"] == 2
