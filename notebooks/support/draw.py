"""A pad in the notebook, on which one draws a digit that a model in the kernel reads."""

from pathlib import Path

import anywidget
import matplotlib.pyplot as plt
import torch
import traitlets
from IPython.core.pylabtools import print_figure


class Pad(anywidget.AnyWidget):
    """A pad that a Net reads, with test images (N, 1, 28, 28) to try; without a browser, a picture of an answer."""

    _esm = Path(__file__).with_name("digit.js").read_text() + "export default { render };\n"
    samples = traitlets.List().tag(sync=True)

    def __init__(self, model, images, labels):
        super().__init__(samples=list(zip(labels.tolist(), images.flatten(1).tolist())))
        self.model = model
        self.on_msg(lambda _, message, buffers: self.send(self.read(message["image"]) | {"number": message["number"]}))

    @torch.inference_mode()
    def read(self, pixels):
        """Return the float32 logits and the first layer's feature maps of an image, a list of 784 values, 0 to 255."""
        model, training = self.model, self.model.training
        image = torch.tensor(pixels, dtype=torch.uint8, device=model.mean.device).view(1, 1, 28, 28)
        model.eval()
        maps = model.relu1(model.pool1(model.conv1((image / 255 - model.mean) / model.std)))
        logits = model(image)
        model.train(training)
        return {"logits": logits[0].tolist(), "maps": maps.flatten().tolist()}

    def _repr_mimebundle_(self, **options):
        data, metadata = super()._repr_mimebundle_(**options)
        label, pixels = self.samples[-1]
        chances = torch.tensor(self.read(pixels)["logits"]).softmax(0)
        figure, (left, right) = plt.subplots(1, 2, figsize=(5, 2), width_ratios=(1, 2), layout="constrained")
        left.imshow(torch.tensor(pixels).view(28, 28).numpy(), cmap="gray_r")
        left.set(xticks=[], yticks=[], title="In JupyterLab,\nyou draw here")
        right.bar(range(10), (100 * chances).tolist())
        right.set(xticks=range(10), ylim=(0, 100), xlabel="digit", ylabel="%")
        plt.close(figure)
        data |= {"image/png": print_figure(figure, base64=True), "text/plain": "In JupyterLab, you draw a digit here."}
        return data, metadata | {"image/png": {"alt": f"A {label}, read as a {chances.argmax()}: {chances.max():.0%}"}}
