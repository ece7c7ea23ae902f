"""Runs mnist.py and posts its progress and metrics to the status of its TrainJob.

    torchrun trainjob_progress.py mnist.py ARGUMENT...

Where Kubeflow Trainer's feature gate TrainJobStatus is off, nothing is posted.
"""

import datetime
import json
import os
import re
import runpy
import ssl
import sys
import urllib.request


def post(percent, metrics):
    """Post the progress (0..100) and a dict of metrics; a report that is lost must not stop the training."""
    status = {"progressPercentage": int(percent)}
    status["lastUpdatedTime"] = datetime.datetime.now(datetime.timezone.utc).isoformat()
    status["metrics"] = [{"name": name, "value": value} for name, value in metrics.items()]
    body = json.dumps({"trainerStatus": status}).encode()
    try:
        with open(os.environ["KUBEFLOW_TRAINER_SERVER_TOKEN"]) as file:  # read each time, as it is renewed
            headers = {"Authorization": f"Bearer {file.read()}", "Content-Type": "application/json"}
        request = urllib.request.Request(os.environ["KUBEFLOW_TRAINER_SERVER_URL"], body, headers)
        context = ssl.create_default_context(cafile=os.environ["KUBEFLOW_TRAINER_SERVER_CA_CERT"])
        urllib.request.urlopen(request, timeout=2, context=context).close()
    except OSError as error:
        print(f"The progress was not posted: {error}", flush=True)


def report(line, epochs):
    """Post what a line of the log says; other lines are passed over."""
    if match := re.match(r"Epoch: (\d+)(?: \( *([\d.]+)%\))? - (.*)", line):
        done = int(match[1]) - 1 + float(match[2] or 100) / 100
        post(100 * done / epochs, dict(word.split("=") for word in match[3].split()))


class Log:
    """Standard output, which reads along."""

    def __init__(self, stream, epochs):
        self.stream, self.epochs = stream, epochs

    def write(self, text):
        report(text, self.epochs)
        return self.stream.write(text)

    def flush(self):
        self.stream.flush()


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if "KUBEFLOW_TRAINER_SERVER_URL" in os.environ:
        sys.stdout = Log(sys.stdout, int(sys.argv[sys.argv.index("--epochs") + 1]))
    runpy.run_path(sys.argv[0], run_name="__main__")
