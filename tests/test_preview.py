"""The page to look at before a push: what it holds, what it serves, and what happens where a person clicks."""

import gzip
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from datasets import Dataset, Features, List, Nifti, Value
from PIL import Image

from datasets_bids import preview
from datasets_bids.pictures import Preview

from .phantom import Head
from .test_push import run


CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
SHAPE = (32, 32, 16)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three subjects; the second has no mask, the third no age."""
    root = tmp_path_factory.mktemp("tree")
    for i in (1, 2, 3):
        folder = root / f"sub-{i}" / "anat"
        Head(i).save(folder / f"sub-{i}_T1w.nii.gz", "dwi", SHAPE)
        if i != 2:
            Head(i).save(folder / f"sub-{i}_mask.nii.gz", "lesion-msk", SHAPE)
    (root / "participants.tsv").write_text(
        "participant_id\tage\tnote\nsub-1\t60\t</script><b>x\nsub-2\t61\ty\nsub-3\tn/a\tz\n"
    )
    (root / "schema.yaml").write_text(
        "schema:\n  t1w: anat/*_T1w.nii.gz\n  mask: {path: anat/*_mask.nii.gz, optional: true}\n"
        "metadata_from: participants.tsv\npreview:\n  mask: t1w\n"
    )
    return root


@pytest.fixture(scope="module")
def html(tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "preview.html"
    done = run(
        "-m", "datasets_bids.preview", "bids", "--data-dir", tree, "--schema", tree / "schema.yaml", "--out", out
    )
    assert done.returncode == 0, done.stderr
    assert "open it in a browser" in done.stdout
    return out


@pytest.fixture(scope="module")
def served(tree):
    command = [sys.executable, "-m", "datasets_bids.preview", "bids", "--data-dir", tree]
    command += ["--schema", tree / "schema.yaml", "--serve"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [*map(str, command)], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    line = process.stdout.readline()
    yield re.search(r"http://\S+", line)[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def rows_of(text: str) -> list[dict]:
    return [json.loads(row) for row in re.findall(r'<script type="application/json" class="row">(.*?)</script>', text)]


def test_one_page_that_asks_for_nothing(html):
    text = html.read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text) and "@" not in re.sub(r"@media|@import", "", text)
    assert "default-src 'none'" in text
    first, second, third = rows_of(text)
    assert first["scalars"] == {"age": 60, "note": "</script><b>x"} and "</script><b>x" not in text
    assert second["images"]["mask"] == [] and third["scalars"]["age"] is None
    (image,) = first["images"]["mask"]
    assert image["file"] == "sub-1_mask.nii.gz" and image["ml"] > 0 and image["shape"] == "32x32x16"
    assert image["picture"].startswith("data:image/jpeg;base64,")


def test_rows_are_limited_and_written_one_by_one(tree):
    path = str(tree / "sub-1" / "anat" / "sub-1_T1w.nii.gz")
    features = Features({"subject_id": Value("string"), "bold": List(Nifti()), "x": Value("float64")})
    columns = {"subject_id": list("abc"), "bold": [[path, path], [], [path]], "x": [1.5, float("nan"), float("inf")]}
    dataset = Dataset.from_dict(columns, features=features)
    pieces = preview.page(Preview.of({"train": dataset}), dataset, title="<i>", tree="t", max_rows=2)
    head = next(pieces)
    assert "&lt;i&gt;" in head and '"class="row"' not in head
    (first,) = rows_of(next(pieces))
    assert [image["i"] for image in first["images"]["bold"]] == [0, 1]
    assert rows_of(next(pieces))[0]["scalars"]["x"] == "nan"
    assert '"left": 3' in next(pieces) and not list(pieces)


def test_niivue_is_what_the_package_says():
    folder = Path(preview.__file__).parent
    notice = (folder / "niivue.txt").read_text()
    code = gzip.decompress((folder / "niivue.umd.js.gz").read_bytes())
    assert hashlib.sha256(code).hexdigest() in notice
    assert "BSD 2-Clause" in notice and "Copyright (c) 2021, Niivue" in notice


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--out preview.html, --serve, or both"),
        (["--out", "x", "--rows", "0"], "--rows is at least 1"),
    ],
)
def test_options_are_asked_for(args, message, capsys):
    with pytest.raises(SystemExit):
        preview.parse_args(["bids", "--data-dir", "x", *args])
    assert message in capsys.readouterr().err


def test_user_errors_are_one_line(tree, tmp_path, capsys):
    args = ["bids", "--data-dir", str(tree), "--schema", str(tree / "schema.yaml"), "--out", str(tmp_path / "x.html")]
    assert preview.main([*args, "--split", "test"]) == 1
    assert "there is no split 'test'; there is train" in capsys.readouterr().err
    assert preview.main([*args[:-1], str(tmp_path / "nowhere" / "x.html")]) == 1
    assert "nowhere" in capsys.readouterr().err and not list(tmp_path.iterdir())


# -- served --------------------------------------------------------------------------------------------------------------


def get(url: str, path: str | None = None) -> tuple[int, bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)
    connection.request("GET", parts.path if path is None else path)
    response = connection.getresponse()
    return response.status, response.read()


def test_volumes_are_served_as_they_are_to_who_knows_the_secret(served, tree):
    secret = urlsplit(served).path
    assert urlsplit(served).hostname == "127.0.0.1" and len(secret) > 20
    status, page = get(served)
    assert status == 200 and b'class="row"' in page
    status, volume = get(served, f"{secret}volume/2/mask/0/sub-3_mask.nii.gz")
    assert status == 200 and volume == (tree / "sub-3" / "anat" / "sub-3_mask.nii.gz").read_bytes()
    assert get(served, secret + "niivue.js")[0] == 200
    for path in (
        "/",
        "/volume/0/t1w/0",
        "/wrong-secret-of-the-same-length/",
        secret + "volume/1/mask/0",
        secret + "volume/0/age/0",
        secret + "volume/0/t1w/1",
        secret + "volume/0/t1w/-1",
        secret + "volume/9/t1w/0",
        secret + "volume/-1/t1w/0",
        secret + "volume/x/t1w/0",
        secret + "../schema.yaml",
        secret + "volume/0/" + quote("../../schema.yaml", safe="") + "/0",
        secret + "participants.tsv",
    ):
        assert get(served, path)[0] == 404, path


def test_images_without_a_file_are_served_too(tmp_path):
    data = Head(0).image("dwi", SHAPE).to_bytes()
    dataset = Dataset.from_dict({"t1w": [{"path": None, "bytes": data}]}, features=Features({"t1w": Nifti()}))
    (tmp_path / "x.html").write_text("page")
    with preview.Server(0, dataset, str(tmp_path / "x.html")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert get(server.url) == (200, b"page")
        assert get(server.url + "volume/0/t1w/0/volume.nii") == (200, data)
        server.shutdown()


# -- clicked -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (CHROMIUM and DRIVER):
        pytest.skip("there is no Chromium with its driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (
            "--headless=new --no-sandbox --disable-quic --no-first-run --disable-background-networking --disable-sync "
            "--disable-component-update --disable-dev-shm-usage --use-gl=angle --use-angle=swiftshader "
            f"--enable-unsafe-swiftshader --window-size=1400,1000 --user-data-dir={profile}"
        ).split():
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        yield driver
        driver.quit()


def find(browser, selector: str) -> list:
    return browser.find_elements("css selector", selector)


def shown(browser) -> list[str]:
    return [
        article.find_element("tag name", "h2").text for article in find(browser, "article") if article.is_displayed()
    ]


def errors(browser) -> list[dict]:
    """What the console says of scripts that failed, and of anything that the page was not allowed to fetch."""
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def wait_for(condition, seconds: float = 40):
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def test_filters_matrix_and_sizes(browser, html):
    browser.get(html.as_uri())
    assert shown(browser) == ["sub-1", "sub-2", "sub-3"]
    assert wait_for(lambda: all(image.get_property("naturalWidth") > 300 for image in find(browser, "figure img")))
    assert len(find(browser, "figure img")) == 5 and len(find(browser, "figure .none")) == 1
    (subject,) = find(browser, "#subject")
    subject.send_keys("SUB-3")
    assert shown(browser) == ["sub-3"] and find(browser, "#count")[0].text == "1 of 3 rows"
    subject.clear()
    subject.send_keys(" ")
    missing = {option.get_attribute("value"): option for option in find(browser, "#missing option")}
    for value, rows in (
        ("mask", ["sub-2"]),
        ("age", ["sub-3"]),
        ("*", ["sub-2", "sub-3"]),
        ("-", ["sub-1"]),
        ("t1w", []),
    ):
        missing[value].click()
        assert shown(browser) == rows, value
    # The matrix: four columns of 16 px, rows of 12 px below 96 px of names. The second row's second cell is missing.
    pixel = "const c = document.querySelector('#matrix canvas'), r = c.width / parseFloat(c.style.width);"
    pixel += "return [...c.getContext('2d').getImageData((arguments[0] * 16 + 8) * r, (96 + arguments[1] * 12 + 6) * r, 1, 1).data]"
    colours = np.array([[browser.execute_script(pixel, x, y)[:3] for x in range(4)] for y in range(3)])
    red = colours[..., 0] > colours[..., 1]
    assert np.argwhere(red).tolist() == [[1, 1], [2, 2]]
    from selenium.webdriver import ActionChains

    (canvas,) = find(browser, "#matrix canvas")
    size = canvas.size
    where = (8 - size["width"] / 2, 96 + 12 + 6 - size["height"] / 2)
    ActionChains(browser).move_to_element_with_offset(canvas, *map(int, where)).click().perform()
    assert shown(browser) == ["sub-1", "sub-2", "sub-3"], "a click on a row that is filtered out shows it again"
    assert find(browser, "article.at h2")[0].text == "sub-2"
    assert "5 images" in find(browser, "#histogram")[0].text
    find(browser, "#which option[value=mask]")[0].click()
    assert "2 images" in find(browser, "#histogram")[0].text
    heights = [float(bar.get_attribute("height")) for bar in find(browser, "#histogram rect")]
    assert sum(height > 0 for height in heights) in (1, 2)
    assert not errors(browser)


def test_a_page_alone_enlarges_the_picture_and_says_how_to_see_more(browser, html):
    browser.get(html.as_uri())
    find(browser, "figure button")[0].click()
    assert find(browser, "dialog[open] img") and find(browser, "dialog h2")[0].text == "sub-1, t1w"
    assert "--serve" in find(browser, "dialog p")[0].text and "--schema" in find(browser, "dialog p")[0].text
    find(browser, "#close")[0].click()
    assert not find(browser, "dialog[open]")
    assert not errors(browser)


def test_a_click_opens_the_volume_in_niivue(browser, served):
    """With the mask over the image that the builder names, at the mask's largest slices, right on the left."""
    browser.get(served)
    button = next(button for button in find(browser, "figure button") if button.get_attribute("title") == "Open mask")
    button.click()
    (dialog,) = find(browser, "dialog")
    assert wait_for(lambda: dialog.get_attribute("data-state") != "picture")
    note = find(browser, "dialog p")[0].text
    assert dialog.get_attribute("data-state") == "volume", note
    assert "sub-1_T1w.nii.gz 32x32x16 with sub-1_mask.nii.gz 32x32x16" in note
    x, _, _ = browser.execute_script("return rows[0].images.mask[0].centre")
    assert abs(x) > 20, "the lesion is on one side"

    def mask_columns() -> np.ndarray:
        """Of the axial view, the columns (-1 to 1) of pixels that are reddish; the crosshair is plain red."""
        box = find(browser, "#niivue")[0].rect
        picture = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB"), int)
        top, left = int(box["y"]), int(box["x"])
        view = picture[top : top + int(box["height"]), left : left + int(box["width"] / 3)]
        reddish = (view[..., 0] - view[..., 1] > 50) & (view[..., 1] > 50)
        return np.nonzero(reddish)[1] / view.shape[1] * 2 - 1

    assert wait_for(lambda: len(mask_columns()) > 100)
    assert np.sign(mask_columns().mean()) == -np.sign(x)
    find(browser, "#close")[0].click()
    assert not find(browser, "#niivue")
    assert not errors(browser)
