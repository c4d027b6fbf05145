"""What the server's page asks for: its script in node, on elements that only keep what they are given."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import llama_adapter.serving

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")
PAGE = Path(llama_adapter.serving.__file__).with_name("page.html")

WORLD = """
const element = () => {
  const node = { value: "", textContent: "", hidden: false, open: false, children: [], files: [],
    remove() {}, focus() {},
    append(...more) { this.children.push(...more); }, replaceChildren(...more) { this.children = more; },
    scrollIntoView() {}, getContext: () => ({ fillRect() {} }), setAttribute() {},
    classList: { add() {}, remove() {} } };
  return node;
};
const nodes = {}, asked = [];
let turn = 0;
const document = { getElementById: id => (nodes[id] ??= element()), createElement: element };
function Option(text, value) { return { text, value }; }
const refusal = (status, message) => ({ ok: false, status, json: async () => ({ error: { message } }) });
const written = text => ({ ok: true, body: new Blob(
  [`data: ${JSON.stringify({ choices: [{ delta: { content: text } }] })}\\ndata: [DONE]\\n`]).stream() });
async function fetch(path, { headers, body }) {
  if (!headers.Authorization) return refusal(401, "Wrong or missing key");
  if (path === "v1/models") return { ok: true, json: async () => ({ data: [{ id: "base" }, { id: "poet" }] }) };
  asked.push(JSON.parse(body).messages.map(said => said.content));
  turn += 1;
  return turn === 2 ? refusal(429, "Too many") : written("answer " + turn);
}
const settled = () => new Promise(done => setTimeout(done, 50));
const say = async text => { nodes.text.value = text; send(); await settled(); };
"""


def run(steps: str) -> dict:
    """What the page's script and then these steps leave in `found`."""
    script = re.search(r"<script>\n(.*)</script>", PAGE.read_text(), re.DOTALL)[1].replace('"use strict";', "")
    text = f"{WORLD}\n{script}\nconst found = {{}};\n(async () => {{ await settled();\n{steps}\n"
    done = subprocess.run(
        [NODE, "-e", text + "console.log(JSON.stringify(found)); })();"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_regenerating_after_a_refusal_keeps_the_turns_before():
    found = run(
        """$("key").value = "k"; $("one").value = "poet";
        await say("one"); await say("two"); again(); await settled(); again(); await settled(); await say("one");
        found.asked = asked;"""
    )
    before = ["one", "answer 1", "two"]
    assert found["asked"] == [["one"], before, before, before, [*before, "answer 4", "one"]]


def test_the_fault_of_a_missing_key_goes_when_the_key_is_there():
    found = run(
        """const faults = () => $("fault").children.length + $("talk").children.length;
        $("keybox").value = ""; found.without = [faults(), $("keybox").hidden];
        $("key").value = "k"; await list(); found.with = [faults(), $("one").value];"""
    )
    assert found == {"without": [1, False], "with": [0, "poet"]}
