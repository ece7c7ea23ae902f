"""Write site/weights.js, by which the site reads digits: the weights of a trained model, and ten test images.

export.py MODEL    a file of mnist.py --save-model; MNIST is looked for in MNIST_DIR, or else in data/
"""

import base64
import json
import os
import sys
from pathlib import Path

import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
from mnist import DATA, Net, TrainingError, load, predict  # noqa: E402


def main(path):
    """Write the file, or end with a message."""
    model = Net().eval()
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        images, labels = (values[:1000] for values in load(os.environ.get("MNIST_DIR", DATA), "t10k"))
    except (TrainingError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    right = predict(model, images).argmax(1) == labels
    first = [(right & (labels == digit)).int().argmax() for digit in range(10)]
    samples = [(int(labels[i]), images[i].flatten().tolist()) for i in first]
    weights = {name: base64.b64encode(w.numpy().astype("<f4")).decode() for name, w in model.state_dict().items()}
    partial = PROJECT / "site" / "weights.tmp"
    partial.write_text(f"const WEIGHTS = {json.dumps(weights, indent=0)};\nconst SAMPLES = {json.dumps(samples)};\n")
    partial.replace(partial.with_suffix(".js"))


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
