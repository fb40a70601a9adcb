"""Cloud Storage on this machine, in memory: what gcsfs, google-cloud-storage and tensorstore ask.

Of its JSON API: buckets, objects with ranges, listings, uploads (media, multipart, resumable),
moves, deletes, and the conditions on generations. `refused` are methods that are forbidden from
now on, `calls` those that have changed something, in order.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

STAMP = "2026-01-01T00:00:00.000000Z"


class Server:
    """One bucket called `bucket`, at `url`, until the block ends."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.calls: list[tuple[str, str]] = []
        self.refused: set[str] = set()
        self.uploads: list[bytes] = []
        self.lock, self.generation = threading.Lock(), 0

    def __enter__(self) -> "Server":
        handler = type("Handler", (_Handler,), {"store": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def environ(self) -> dict[str, str]:
        """Variables with which every client asks this server, as nobody, and nobody else."""
        nowhere = "127.0.0.1:9"  # the port that discards
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GCE_METADATA_ROOT": nowhere,
            "GCE_METADATA_HOST": nowhere,
            "GCE_METADATA_IP": nowhere,
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def names(self, folder: str = "") -> list[str]:
        """The objects below a folder."""
        return sorted(name for name in self.objects if name.startswith(folder))

    def write(self, name: str, data: bytes) -> None:
        """Make or replace an object."""
        with self.lock:
            self.generation += 1
            self.objects[name] = data, self.generation


class _Handler(BaseHTTPRequestHandler):
    store: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _refuse(self, code: int, message: str) -> None:
        self._answer(code, json.dumps({"error": {"code": code, "message": message}}).encode())

    def _answer(self, code: int, body: bytes = b"", **headers) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _about(self, name: str) -> dict[str, object]:
        data, generation = self.store.objects[name]
        return {
            "kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(data)),
            "generation": str(generation), "metageneration": "1", "updated": STAMP,
            "timeCreated": STAMP,
        }  # fmt: skip

    def _serve(self, method: str) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        parts = urlsplit(self.path)
        self.asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        found = re.fullmatch(r"(?:/download|/upload)?/storage/v1/b/([^/]+)(/o)?/?(.*)", parts.path)
        if not found or found[1] != "bucket":
            return self._refuse(404, "not found")
        if method in self.store.refused:
            return self._refuse(403, "no permission")
        with self.store.lock:
            if not found[2]:
                self._json({"kind": "storage#bucket", "name": "bucket", "id": "bucket"})
            elif not found[3]:
                (self._insert if method == "POST" else self._list)()
            else:
                getattr(self, f"_{method.lower()}")(found[3])

    def _held(self, name: str) -> bool:
        """Whether the conditions on the generation of an object hold; else it is answered."""
        now = self.store.objects[name][1] if name in self.store.objects else 0
        if (wanted := self.asked.get("ifGenerationMatch")) and int(wanted) != now:
            self._refuse(412, "another generation")
            return False
        if (other := self.asked.get("ifGenerationNotMatch")) and int(other) == now:
            self._answer(304)
            return False
        return True

    def _put(self, name: str, data: bytes) -> None:
        self.store.generation += 1
        self.store.objects[name] = data, self.store.generation
        self.store.calls.append(("write", name))

    def _insert(self) -> None:
        name, data = self.asked.get("name", ""), self.body
        if self.asked["uploadType"] == "resumable":
            if "upload_id" not in self.asked:
                if self._held(name):
                    self.store.uploads.append(b"")
                    where = f"{self.store.url}{self.path}&upload_id={len(self.store.uploads) - 1}"
                    self._answer(200, Location=where)
                return
            number = int(self.asked["upload_id"])
            self.store.uploads[number] += data
            data = self.store.uploads[number]
            if self.headers["Content-Range"].rpartition("/")[2] != str(len(data)):
                return self._answer(308, Range=f"bytes=0-{len(data) - 1}")
        elif self.asked["uploadType"] == "multipart":
            mark = re.search('boundary="?([^";]+)', self.headers["Content-Type"])
            assert mark
            _, about, content, _ = data.split(b"--" + mark[1].encode(), 3)
            name = json.loads(about.partition(b"\n\n")[2])["name"]
            data = content.partition(b"\n\n")[2].removesuffix(b"\n")
        if self._held(name):
            self._put(name, data)
            self._json(self._about(name))

    def _list(self) -> None:
        start, mark = self.asked.get("prefix", ""), self.asked.get("delimiter", "")
        first, last = self.asked.get("startOffset", ""), self.asked.get("endOffset", "\uffff")
        items, folders = [], set()
        for name in sorted(self.store.objects):
            if not (name.startswith(start) and first <= name < last):
                continue
            head, cut, _ = name[len(start) :].partition(mark) if mark else (name, "", "")
            if cut:
                folders.add(start + head + cut)
            else:
                items.append(self._about(name))
        self._json({"items": items, "prefixes": sorted(folders)})

    def _get(self, path: str) -> None:
        name = unquote(path)
        if name not in self.store.objects:
            return self._refuse(404, "not found")
        if not self._held(name):
            return None
        if self.asked.get("alt") != "media":
            return self._json(self._about(name))
        data, generation = self.store.objects[name]
        headers = {"x_goog_generation": str(generation)}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first = int(found[1])
            last = min(int(found[2] or len(data)), len(data) - 1)
            if first >= len(data):
                return self._answer(416, b"", **headers)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._answer(206, data[first : last + 1], **headers)
        return self._answer(200, data, **headers)

    def _delete(self, path: str) -> None:
        name = unquote(path)
        if name not in self.store.objects:
            return self._refuse(404, "not found")
        if self._held(name):
            del self.store.objects[name]
            self.store.calls.append(("delete", name))
            self._answer(204)
        return None

    def _post(self, path: str) -> None:
        source, _, target = (unquote(part) for part in path.partition("/moveTo/o/"))
        if source not in self.store.objects:
            return self._refuse(404, "not found")
        self._put(target, self.store.objects.pop(source)[0])
        return self._json(self._about(target))

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_DELETE(self) -> None:
        self._serve("DELETE")
