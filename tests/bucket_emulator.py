"""Google Cloud Storage on a port of this machine, in memory, with the bucket `bucket`.

    python bucket_emulator.py PORT

gcp-storage-emulator, with a part of Google's service that it lacks: requests that depend on
the generation of an object (`ifGenerationMatch`), and the generation in the answers. It
answers one request at a time.
"""

import sys
import threading
from http import HTTPStatus
from http.server import HTTPServer

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound


def name_of(request) -> str | None:
    """The object that a request is about, if it is about one."""
    if "object_id" in request.params:
        return request.params["object_id"]
    if "name" in request.query:
        return request.query["name"][0]
    data = request.data if request.method == server.POST else None
    return (
        data["meta"].get("name") if isinstance(data, dict) and "meta" in data else None
    )


def generation_of(storage, bucket: str | None, name: str | None) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def with_generations(handler):
    def handle(request, response, storage, *args, **options):
        now = generation_of(
            storage, request.params.get("bucket_name"), name_of(request)
        )
        asked = {
            name: request.query[f"ifGeneration{name}"][0]
            for name in ("Match", "NotMatch")
            if f"ifGeneration{name}" in request.query
        }
        if asked.get("Match", now) != now:
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": "conditionNotMet"}})
        elif asked.get("NotMatch") == now:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage, *args, **options)
        if request.method == server.GET and now != "0":
            response["x-goog-generation"] = now

    return handle


def main():
    HTTPServer.request_queue_size = 512  # tensorstore connects by the dozen
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            handlers[method] = with_generations(handler)
    port = int(sys.argv[1])
    server.create_server("127.0.0.1", port, True, default_bucket="bucket").start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
