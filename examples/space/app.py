"""
A page that recommends: pick a history, see the ranked items, the depth that was chosen and the latent path.

    pip install -e ".[demo]" && python examples/space/app.py --model outputs/quickstart/model

As a Space of the Hugging Face Hub it reads the name of the model from the variable MODEL_ID, and needs the variable
TRUST_REMOTE_CODE=1 to run the code in the model's repository, since a Space does not have this package. Set
MODEL_REVISION to a commit of the repository, so that no other code runs than the one that you have read.
"""

import argparse
import os
import time


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
from transformers import pipeline


MANY_ITEMS = 2000  # a longer list of choices needs a search
INTRODUCTION = """# Recommendations of {name}

Pick what a user had so far, oldest first. The model thinks a few steps in hidden states, as many as it finds useful
for this user, and ranks all {count:,} items. Move the slider to see the list after another number of steps."""


def load(model: str, trust_remote_code: bool, revision: str | None = None):
    """The recommender of a checkpoint: with this package, or with the code in the model's repository."""
    if trust_remote_code:
        task = "generative-recommendation"
        return pipeline(task, model=model, revision=revision, trust_remote_code=True).recommender
    from lasar_hf import Recommender

    return Recommender.from_pretrained(model, revision=revision)


class Demo:
    """The functions behind the page, for one recommender."""

    def __init__(self, recommender):
        self.recommender = recommender
        catalog = recommender.catalog
        titles = catalog.titles or [None] * len(catalog)
        self.names = {item_id: title or item_id for item_id, title in zip(catalog.item_ids, titles, strict=True)}

    def choices(self, text: str = "", chosen: list[str] | None = None) -> list[tuple[str, str]]:
        """Names and ids of the first items whose name contains a text, and of those that are chosen already."""
        wanted = text.casefold()
        found = [item_id for item_id, name in self.names.items() if wanted in name.casefold()][:MANY_ITEMS]
        return [(self.names[item_id], item_id) for item_id in dict.fromkeys([*(chosen or []), *found])]

    def recommend(self, history: list[str], by_policy: bool, steps: int) -> tuple[str, list[list]]:
        """What happened in one sentence, and the ranked items."""
        if not history:
            return "Pick at least one item.", []
        start = time.perf_counter()
        (result,) = self.recommender.recommend([history], latent_steps=None if by_policy else steps)
        milliseconds = 1000 * (time.perf_counter() - start)
        who = "The policy chose" if by_policy else "You chose"
        rows = [
            [rank, self.names[item["item_id"]], f"{np.exp(item['score']):.1%}"]
            for rank, item in enumerate(result["items"], start=1)
        ]
        return f"**{who} {result['latent_steps']} latent steps.** The list took {milliseconds:.0f} ms.", rows

    def explain(self, history: list[str]):
        """The figure of an explanation: policy, list at every depth, latent path; nothing without a history."""
        if not history:
            return None
        return self.recommender.explain(history).figure()


def build(recommender, name: str) -> gr.Blocks:
    """The page."""
    demo, max_steps = Demo(recommender), recommender.model.config.max_latent_steps
    ids = recommender.catalog.item_ids
    with gr.Blocks(title="LASAR") as page:
        gr.Markdown(INTRODUCTION.format(name=name, count=recommender.catalog.num_items))
        with gr.Row():
            with gr.Column(scale=2):
                search = gr.Textbox(label="Search", visible=len(ids) > MANY_ITEMS, placeholder="Part of a title")
                history = gr.Dropdown(
                    demo.choices(), multiselect=True, label="History, oldest first", elem_id="history"
                )
                by_policy = gr.Checkbox(True, label="The policy chooses the number of latent steps", elem_id="policy")
                steps = gr.Slider(0, max_steps, 1, step=1, label="Latent steps", interactive=True, elem_id="steps")
                gr.Examples([[ids[:2]], [ids[2:4]], [ids[4:5]]], [history], label="Examples")
            with gr.Column(scale=3):
                said = gr.Markdown("Pick at least one item.", elem_id="said")
                ranked = gr.Dataframe(
                    headers=["rank", "item", "probability"],
                    datatype=["number", "str", "str"],
                    interactive=False,
                    column_widths=["15%", "60%", "25%"],
                    elem_id="ranked",
                )
        figure = gr.Plot(show_label=False, elem_id="figure")
        search.change(lambda text, chosen: gr.update(choices=demo.choices(text, chosen)), [search, history], history)
        inputs, outputs = [history, by_policy, steps], [said, ranked]
        history.change(demo.recommend, inputs, outputs).then(demo.explain, history, figure)
        by_policy.input(demo.recommend, inputs, outputs)
        # A moved slider decides.
        steps.input(lambda: False, None, by_policy).then(demo.recommend, inputs, outputs)
    return page


def main() -> None:
    """Read the arguments and show the page."""
    parser = argparse.ArgumentParser(description="A page that recommends.")
    parser.add_argument("--model", default=os.environ.get("MODEL_ID"), help="folder of a checkpoint or a model id")
    parser.add_argument(
        "--revision", default=os.environ.get("MODEL_REVISION"), help="branch, tag or commit of a model on the Hub"
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        default=os.environ.get("TRUST_REMOTE_CODE") == "1",
        help="run the code in the model's repository instead of this package",
    )
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on")
    args = parser.parse_args()
    if args.model is None:
        parser.error("--model is missing; give a folder, a model id, or the variable MODEL_ID.")
    recommender = load(args.model, args.trust_remote_code, args.revision)
    name = "/".join(os.path.normpath(args.model).split(os.sep)[-2:])
    try:
        build(recommender, name).launch(server_name=args.host, server_port=args.port)
    except OSError as error:
        parser.error(f"port {args.port} cannot be used ({error}). Choose another --port.")


if __name__ == "__main__":
    main()
