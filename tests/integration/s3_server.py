"""moto's S3 on loopback, with faults on demand: `python s3_server.py PORT`, a JSON command a line, answered by a line.

{"up": bool}: listen, or close the port; what is stored stays. {"fault": {method, key, times, do, mark}}: the next requests whose
path matches are answered by 503, or, where `do` is hold, never: half of the body is read, and the file `mark` appears.
"""

import json
import re
import sys
import threading
from pathlib import Path

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

moto = DomainDispatcherApplication(create_backend_app)
faults: list[dict] = []


def application(environ, start_response):
    path = f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
    for fault in faults:
        if fault["times"] and environ["REQUEST_METHOD"] == fault["method"] and re.search(fault["key"], path):
            fault["times"] -= 1
            if fault["do"] == "hold":
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 2) // 2)
                Path(fault["mark"]).touch()
                threading.Event().wait()
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Service Unavailable", [("Content-Type", "application/xml")])
            return [b"<Error><Code>ServiceUnavailable</Code><Message>Try again</Message></Error>"]
    return moto(environ, start_response)


class Quiet(WSGIRequestHandler):
    def log(self, *arguments):
        pass


def main(port):
    server = None
    for line in sys.stdin:
        command = json.loads(line)
        if "fault" in command:
            faults[:] = [command["fault"]]
        elif command["up"]:
            server = make_server("127.0.0.1", port, application, threaded=True, request_handler=Quiet)
            threading.Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.shutdown()
            server.server_close()
        print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
