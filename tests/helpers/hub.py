"""As much of the Hugging Face hub as making, filling, listing and reading repositories needs, on this machine."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

from tests.helpers import web

TOKEN = "hf_not_a_real_token"


class Repository:
    """``commits`` are ``{sha: {path: content}}``, ``refs`` are ``{branch or tag: sha}``."""

    def __init__(self, files=None, private=False):
        self.commits, self.refs, self.messages = {}, {}, []
        self.private, self.gated, self.tags = private, False, set()
        self.commit("main", files or {}, "initial commit")

    def commit(self, branch, files, message=""):
        self.messages.append(message)
        sha = hashlib.sha1(f"{len(self.messages)} {sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        return sha

    def files(self, revision="main"):
        """The files of a branch, tag or commit; None where there is none."""
        return self.commits.get(self.refs.get(revision, revision))


class Hub(ThreadingHTTPServer):
    """``repositories`` are ``{"models/me/sae": Repository}``; who has ``TOKEN`` is ``me``."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.objects, self.asked, self.ranges = {}, {}, [], []
        self.cuts = {}  # {path: how many transfers are cut in their middle}
        self.down = False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):  # who cuts a connection makes noise here
        pass


def oid(data):
    """What git calls a file."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def tag(data):
    """The ETag of a file: that of the large ones is their sha256, as on the hub."""
    return hashlib.sha256(data).hexdigest() if len(data) > 1000 else oid(data)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, code, name=""):
        self.answer(code, {"error": name or str(code)}, X_Error_Code=name)

    def route(self):
        path, _, self.query = self.path.partition("?")
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.server.asked.append((self.command, unquote(path)))
        self.user = "me" if self.headers.get("Authorization") == f"Bearer {TOKEN}" else None
        if self.server.down:
            self.close_connection = True
            return None
        for pattern, work in ROUTES:
            if found := re.fullmatch(pattern, path):
                return getattr(self, work)(*map(unquote, found.groups()))
        return self.fail(404, "no such route")

    do_GET = do_HEAD = do_POST = do_PUT = route

    def repository(self, kind, name, write=False):
        """The repository, if it is there and may be read or written; else the answer is given."""
        found = self.server.repositories.get(f"{kind}/{name}")
        own = self.user is not None and name.startswith(f"{self.user}/")
        if found is None or (found.private and not own):
            self.fail(404 if self.user else 401, "RepoNotFound")
        elif found.gated and not own:
            self.fail(403, "GatedRepo")
        elif write and not own:
            self.fail(403 if self.user else 401)
        else:
            return found
        return None

    def create(self):
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        name = f"{asked.get('type', 'model')}s/{owner}/{asked['name']}"
        if self.user is None:
            self.fail(401)
        elif owner != self.user:
            self.fail(403)
        elif name in self.server.repositories:
            self.answer(409, {"url": f"{self.server.url}/{owner}/{asked['name']}", "error": "there already"})
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.repositories[name] = Repository(private=private)
            self.answer(200, {"url": f"{self.server.url}/{owner}/{asked['name']}"})

    def about(self, kind, name, revision="main"):
        if found := self.repository(kind, name):
            if (files := found.files(revision)) is None:
                return self.fail(404, "RevisionNotFound")
            sha = found.refs.get(revision, revision)
            siblings = [{"rfilename": f} for f in files]
            self.answer(200, {"id": name, "sha": sha, "private": found.private, "siblings": siblings})

    def refs(self, kind, name):
        if found := self.repository(kind, name):
            rows = {
                key: [
                    {"name": n, "ref": f"refs/{key}/{n}", "targetCommit": s}
                    for n, s in found.refs.items()
                    if (n in found.tags) == (key == "tags")
                ]
                for key in ("branches", "tags")
            }
            self.answer(200, {**rows, "converts": [], "pullRequests": []})

    def branch(self, kind, name, branch):
        if found := self.repository(kind, name, write=True):
            if branch in found.refs:
                return self.fail(409)
            found.refs[branch] = found.refs["main"]
            self.answer(200, {})

    def tree(self, kind, name, revision, below=""):
        found = self.repository(kind, name)
        if not found:
            return
        if (files := found.files(revision)) is None:
            return self.fail(404, "RevisionNotFound")
        start, rows = f"{below.strip('/')}/" if below.strip("/") else "", []
        for path in sorted(f for f in files if f.startswith(start)):
            rest = path[len(start) :]
            if "/" in rest and "recursive=true" not in self.query.lower():
                row = {"type": "directory", "oid": "c" * 40, "size": 0, "path": start + rest.split("/")[0]}
            else:
                data = files[path]
                row = {"type": "file", "oid": oid(data), "size": len(data), "path": path}
                if len(data) > 1000:
                    row["lfs"] = {"oid": tag(data), "size": len(data), "pointerSize": 130}
            rows += [row] if row not in rows else []
        self.answer(200, rows)

    def resolve(self, kind, name, revision, path):
        found = self.repository(f"{kind.strip('/') or 'models'}", name)
        if not found:
            return
        if (files := found.files(revision)) is None:
            return self.fail(404, "RevisionNotFound")
        about = {"X_Repo_Commit": found.refs.get(revision, revision)}
        if path not in files:
            return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", **about)
        data, part = files[path], self.headers.get("Range")
        about |= {"ETag": f'"{tag(data)}"', "Accept_Ranges": "bytes"}
        first, last = 0, len(data) - 1
        if part:
            first, last = (int(n) if n else last for n in part.removeprefix("bytes=").split("-"))
            self.server.ranges.append((path, first))
            about["Content_Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
        body = data[first : last + 1]
        if self.command == "GET" and self.server.cuts.get(path):
            self.server.cuts[path] -= 1
            self.send_response(206 if part else 200)
            for header, value in {**about, "Content_Length": str(len(body))}.items():
                self.send_header(header.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        self.answer(206 if part else 200, body, **about)

    def preupload(self, kind, name, revision):
        if found := self.repository(kind, name, write=True):
            if found.files(revision) is None:
                return self.fail(404, "RevisionNotFound")
            there = found.files(revision)
            rows = [
                {
                    "path": f["path"], "shouldIgnore": False,
                    "oid": oid(there[f["path"]]) if f["path"] in there else None,
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                }
                for f in json.loads(self.body)["files"]
            ]  # fmt: skip
            self.answer(200, {"files": rows})

    def batch(self, name):
        if self.repository("models", name, write=True):
            rows = []
            for o in json.loads(self.body)["objects"]:
                known = o["oid"] in self.server.objects
                up = {"upload": {"href": f"{self.server.url}/objects/{o['oid']}", "header": {}}}
                rows.append({**o, **({} if known else {"actions": up})})
            self.answer(200, {"transfer": "basic", "objects": rows})

    def put(self, name):
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        assert hashlib.sha256(self.body).hexdigest() == name
        self.server.objects[name] = self.body
        self.answer(200)

    def commit(self, kind, name, revision):
        found = self.repository(kind, name, write=True)
        if not found:
            return
        files, message = dict(found.files(revision)), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files, message)
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def validate(self):
        """Refuses a card whose block of metadata is no mapping or names no licence that the hub has."""
        text = json.loads(self.body)["content"]
        block = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        wrong = [] if isinstance(block, dict) else ["metadata is no mapping"]
        if not wrong and block.get("license") not in (None, "apache-2.0", "mit", "cc-by-4.0", "other"):
            wrong = [f'"license" must be one of the list, not {block["license"]}']
        self.answer(400 if wrong else 200, {"errors": [{"message": w} for w in wrong], "warnings": []})


_NAME = r"([\w.-]+/[\w.-]+)"
_API = rf"/api/(models|datasets)/{_NAME}"
ROUTES = [
    ("/api/repos/create", "create"), ("/api/validate-yaml", "validate"), (_API, "about"), (rf"{_API}/refs", "refs"),
    (rf"{_API}/revision/([^/]+)", "about"), (rf"{_API}/branch/([^/]+)", "branch"),
    (rf"{_API}/tree/([^/]+)", "tree"), (rf"{_API}/tree/([^/]+)/(.*)", "tree"),
    (rf"{_API}/preupload/([^/]+)", "preupload"), (rf"{_API}/commit/([^/]+)", "commit"),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", "batch"), (r"/objects/(\w+)", "put"),
    (rf"/(datasets/|){_NAME}/resolve/([^/]+)/(.+)", "resolve"),
]  # fmt: skip


def serving():
    """A running hub."""
    return web.serving(Hub)


def used_by(server, monkeypatch, cache, token=TOKEN):
    """Let huggingface_hub of this process use this hub, with a cache and a token of the test's own."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    rest = template.split("/{repo_id}")[1]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}" + rest)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache) + "-token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # which speaks to servers of its own
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    huggingface_hub.HfFileSystem.clear_instance_cache()


def environment(server, cache, token=TOKEN):
    """The same for another process."""
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": token or ""}  # fmt: skip
