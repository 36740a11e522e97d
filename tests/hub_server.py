"""A server that answers as the Hugging Face hub does for what an upload asks, in a thread.

It keeps what it is sent: repositories, files, commits, and each request. A file of an LFS upload
counts only if its bytes have the SHA-256 and size that were announced; a commit that names others
is refused. Cards are checked by rules of their own, after those of the hub."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import yaml

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


def flaws(card: str) -> list[str]:
    """What is wrong with the YAML of a model card."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if not found:
        return ["no YAML at the top"]
    told, wrong = yaml.safe_load(found[1]), []
    for key in ("base_model", "datasets"):
        values = told.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(HUB_ID, value):
                wrong.append(f'"{key}" with value "{value}" is not valid')
    if told.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        wrong.append('"base_model_relation" is unknown')
    for entry in told.get("widget", []):
        if not isinstance(entry.get("text"), str) or not isinstance(entry["output"]["url"], str):
            wrong.append('"widget" has an entry without text or output.url')
    if not all(isinstance(tag, str) for tag in told.get("tags", [])):
        wrong.append('"tags" must be texts')
    return wrong


class Hub(ThreadingHTTPServer):
    """token: the one login, of the user "me", who may write to me/... alone."""

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.requests, self.repositories, self.blobs = token, [], {}, {}
        self.commits: list[list[dict]] = []
        self.broken = ""  # a part of a path whose requests fail
        self.xet = False  # whether it says that it has Xet storage
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *given):
        pass

    def answer(self, status: int, content: dict | None = None):
        body = json.dumps(content or {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one(self):
        path = urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path))
        if self.server.broken and self.server.broken in path:
            return self.answer(400, {"error": "the disk of the server is full"})
        known = self.headers.get("Authorization") == f"Bearer {self.server.token}"
        if path.startswith("/lfs/"):  # a storage of its own, which knows no logins
            return self.store(path.split("/")[2], body)
        if path != "/" and not known:
            return self.answer(401, {"error": "Invalid username or password."})
        given = json.loads(body) if body and "/commit/" not in path else {}
        if path == "/":
            return self.answer(200)
        if path == "/api/repos/create":
            return self.create(given)
        if path == "/api/validate-yaml":
            errors = [{"message": message} for message in flaws(given["content"])]
            return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
        name = re.search(r"(?:/api/models)?/([^/]+/[^/]+?)(?:\.git|/|$)", path)[1]
        if name not in self.server.repositories:
            return self.answer(404, {"error": "Repository not found"})
        repository = self.server.repositories[name]
        if path.endswith("/preupload/main"):
            return self.answer(200, {"files": [mode(f, repository) for f in given["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.answer(200, {"objects": [self.upload(one) for one in given["objects"]]})
        if path.endswith("/commit/main"):
            return self.commit(repository, [json.loads(line) for line in body.splitlines()])
        if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
            return self.answer(200, {"id": name, "private": repository["private"], "sha": "0" * 40})
        if path.endswith("/xet-write-token/main") and self.server.xet:
            return self.answer(200)
        self.answer(404, {"error": "Not found"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_one

    def create(self, given: dict):
        name = f"{given['organization']}/{given['name']}"
        if given["organization"] != "me":
            return self.answer(403, {"error": "You don't have the rights to create a model there"})
        if name in self.server.repositories:
            there = {"error": "You already created this model repo"}
            return self.answer(409, there | {"url": f"{self.server.url}/{name}"})
        private = given.get("visibility") == "private" or given.get("private") is True
        self.server.repositories[name] = {"name": name, "private": private, "files": {}}
        self.answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def upload(self, one: dict) -> dict:
        place = {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}
        there = one["oid"] in self.server.blobs
        return {"oid": one["oid"], "size": one["size"]} | ({} if there else {"actions": place})

    def store(self, oid: str, body: bytes):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "other bytes than announced"})
        self.server.blobs[oid] = body
        self.answer(200)

    def commit(self, repository: dict, lines: list[dict]):
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.server.blobs:
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                return self.answer(400, {"error": f"{line['key']} of what was not uploaded"})
        repository["files"] |= files
        self.server.commits.append(lines)
        oid = "1" * 40
        place = f"{self.server.url}/{repository['name']}/commit/{oid}"
        self.answer(200, {"commitUrl": place, "commitOid": oid})


def mode(file: dict, repository: dict) -> dict:
    """Of a file, as .gitattributes of a new repository has it; oid: of what is there."""
    large = file["size"] > 0 and file["path"].endswith((".safetensors", ".png"))
    there = repository["files"].get(file["path"])
    oid = None
    if there is not None:
        blob = b"blob %d\0" % len(there) + there
        oid = hashlib.sha256(there).hexdigest() if large else hashlib.sha1(blob).hexdigest()
    ways = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
    return {"path": file["path"]} | ways
