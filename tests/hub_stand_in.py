"""A stand-in for the hub: as much of its HTTP API as its client uses for adapters, in memory, on a local port."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import yaml

TOKENS = {"hf_owner": "write", "hf_reader": "read"}
LARGE = ".safetensors"


class Repository:
    """Branches of commits, each of which is a list of files."""

    def __init__(self, private):
        self.private = private
        self.commits = {}
        self.branches = {}
        self.commit("main", {})

    def commit(self, branch, files):
        before = self.commits.get(self.branches.get(branch), {})
        sha = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = {**before, **files}
        self.branches[branch] = sha
        return sha

    def resolve(self, revision):
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub:
    """What the server knows; `asked` has every request, `status` makes it answer all of them so."""

    def __init__(self):
        self.repositories, self.large, self.asked = {}, {}, []
        self.status = None

    def files(self, repository, revision="main"):
        repository = self.repositories[repository]
        return repository.commits[repository.resolve(revision)]


def oid_of(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    @property
    def hub(self):
        return self.server.hub

    def reply(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code=None, message="no"):
        headers = {"X_Error_Message": message} | ({} if code is None else {"X_Error_Code": code})
        self.reply(status, {"error": message}, **headers)

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlparse(self.path).path)
        self.hub.asked.append((self.command, path))
        if self.hub.status is not None:
            return self.refuse(self.hub.status)
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return answer(self, body, *found.groups())
        return self.refuse(404, message=f"no such route: {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    @property
    def right(self):
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def resolved(self, name, revision):
        """A repository and its commit of a revision; else the refusal is sent and the commit None."""
        repository = self.repository(name)
        sha = None if repository is None else repository.resolve(revision)
        if repository is not None and sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, sha

    def repository(self, name, write=False):
        """The repository that may be seen, or written to; else the refusal is sent and None returned."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.right is None):
            return self.refuse(401 if self.right is None else 404, "RepoNotFound", "Repository not found")
        if write and self.right != "write":
            return self.refuse(401 if self.right is None else 403, message="no right to write")
        return found

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self.right is None:
            return self.refuse(401, message="Invalid username or password.")
        if name in self.hub.repositories:
            return self.reply(409, {"error": "You already created this model repo", "url": self.url(name)})
        if self.right != "write" or asked["organization"] != "owner":
            return self.refuse(403, message=f"You have no right to create a model under {asked['organization']}")
        self.hub.repositories[name] = Repository(asked.get("visibility") == "private")
        return self.reply(200, {"url": self.url(name)})

    def url(self, path):
        return f"http://{self.headers['Host']}/{path}"

    def validate(self, body):
        card = json.loads(body)["content"]
        values = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
        base = values.get("base_model")
        errors = [] if base is None or re.fullmatch(r"[\w-]+/[\w.-]+", base) else [{"message": "base_model is no id"}]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, body, name, revision="main"):
        repository, sha = self.resolved(name, revision)
        if sha is None:
            return None
        files = [{"rfilename": file} for file in repository.commits[sha]]
        return self.reply(200, {"id": name, "private": repository.private, "sha": sha, "siblings": files})

    def tree(self, body, name, revision):
        repository = self.repository(name)
        if repository is None:
            return None
        entries = []
        for path, content in repository.commits[repository.resolve(revision)].items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": oid_of(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return self.reply(200, entries)

    def preupload(self, body, name, revision):
        repository = self.repository(name, write=True)
        if repository is None:
            return None
        if repository.resolve(revision) is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
        return self.reply(
            200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        )

    def batch(self, body, name):
        if self.repository(name, write=True) is None:
            return None
        objects = json.loads(body)["objects"]
        actions = [{**o, "actions": {"upload": {"href": self.url(f"large/{o['oid']}")}}} for o in objects]
        return self.reply(200, {"transfer": "basic", "objects": actions})

    def put(self, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.reply(200)

    def branch(self, body, name, branch):
        repository = self.repository(name, write=True)
        if repository is None:
            return None
        if branch in repository.branches:
            return self.refuse(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return self.reply(201, {})

    def commit(self, body, name, revision):
        repository = self.repository(name, write=True)
        if repository is None:
            return None
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        sha = repository.commit(revision, files)
        return self.reply(200, {"commitUrl": self.url(f"{name}/commit/{sha}"), "commitOid": sha})

    def resolve(self, body, name, revision, path):
        repository, sha = self.resolved(name, revision)
        if sha is None:
            return None
        if path not in repository.commits[sha]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = repository.commits[sha][path]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else oid_of(content)
        return self.reply(200, content, ETag=f'"{etag}"', X_Repo_Commit=sha)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate),
    (("GET",), rf"/api/models/{NAME}", Handler.info),
    (("GET",), rf"/api/models/{NAME}/revision/(.+)", Handler.info),
    (("GET",), rf"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    (("POST",), rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (("POST",), rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (("POST",), rf"/api/models/{NAME}/branch/(.+)", Handler.branch),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (("PUT",), r"/large/(\w+)", Handler.put),
    (("GET", "HEAD"), rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


@contextmanager
def stand_in():
    """The running hub and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
