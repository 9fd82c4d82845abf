"""What ``--help`` says."""

TRAIN_HELP = """\
python train.py [experiment=NAME] [key=value ...]        (ldm train is the same)

Trains one stage. Alone it trains experiment=emoji/diffusion on the data that come with the package.

experiments   {experiments}
data          emoji48 emoji200 emoji shards (data.train.paths=DIR data.validation.paths=DIR)
trainer       cpu gpu          logger  csv tensorboard wandb
autoencoder   emoji sd         unet    emoji sd15         diffusion  linear scaled_linear

output=RUN_DIR                 where everything goes           (outputs/EXPERIMENT/DATE-TIME)
resume=RUN_DIR                 go on with a run, in place
init=PATH                      start from the weights of a run or checkpoint
seed=0                         decides weights, order, noise
trainer.max_steps=N            optimiser steps
trainer.devices=2 trainer.accelerator=cpu data.num_workers=2 data.batch_size=32
optimizer.learning_rate=1e-3   optimizer.decay=constant|cosine|linear
diffusion.prediction=epsilon|v|x0   min_snr=5   caption_dropout=0.1   loss.beta=0.18
autoencoder.weights=emoji|PATH stage two: the frozen autoencoder
checkpoint.every=N             validation.every=N             samples.every=N

A run folder holds checkpoints/ samples/ metrics.csv config.yaml. Ctrl-C finishes the step and saves.
All settings with their comments: configs/train.yaml and the folders beside it.
"""

SAMPLE_HELP = """\
python sample.py PROMPT [PROMPT ...] [key=value ...]      (ldm sample is the same)

Draws pictures of prompts. A bare argument is a prompt, to the letter; it is a setting exactly if it
begins with key=

model=emoji             bundled: {models}; a run, checkpoint or diffusers folder, a .safetensors, a hub id
prompt= prompts_file=   a prompt; a text file with one prompt a line
negative_prompt=        what to push away from
num_images=1            pictures a prompt
steps=50                1 to 1000                        (12 for sampler=auto)
guidance_scale=         1 is no guidance                 (what the model recommends)
sampler=ddim            {samplers_1}
                        {samplers_2}
grid=                   {grids}                  (the model's own)
seed=0                  of the first picture; null draws one; [3,7] gives one each
height= width=          multiples of 8                   (the model's own)
eta=0                   ddim's η
guidance_interval=[200,800]  guidance between these timesteps alone      guidance_rescale=0
init_image=FILE         start from a picture             strength=0.8   part of the steps that change it
mask=FILE               with init_image: white is painted anew, black is kept
resize=native           interpolate, refine: begin at the model's own size
batch_size=16 tile=     pictures at a time; latents a side to decode at a time
precision=              float32 float32_winograd bfloat16 float16 auto       (that of the weights)
compile=false           torch.compile the UNet first: for many pictures on a GPU        offload=false  GPU memory
safety=                 nsfw blurs what Open NSFW flags  (off)
weights=ema             ema or raw
device= devices=1       cpu, cuda; processes that share the work (torchrun does as well)
output=DIR              (outputs/samples/DATE-TIME); a stopped run goes on with what is missing

  python sample.py "a red apple, noto style" num_images=4
  python sample.py prompts_file=prompts.txt output=pictures guidance_scale=4
"""

MAIN_HELP = """\
ldm train      train a stage                    ldm train --help
ldm sample     draw pictures of prompts         ldm sample --help
ldm evaluate   score, compare, sweep            ldm evaluate --help
ldm reproduce  make a picture again             ldm reproduce --help
ldm pack       make shards of your own data     ldm pack --help
ldm index      check a shard and index it       ldm index --help
ldm convert    weights of others to ours        ldm convert --help
"""

EVALUATE_HELP = """\
ldm evaluate [model=emoji] [key=value ...]

Scores a model on the emoji data: pair accuracy (concept and style together) on held-out pairs and on as many training
pairs, beside real images, chance and a model that ignores the style; FD, KID, precision, recall, text alignment and
diversity over EfficientNet features; its loss by timestep and caption; its autoencoder. Every figure has its interval.

model=emoji           bundled name, run folder or checkpoint folder; a stage-one run scores the autoencoder alone
data=emoji48          emoji48 (what the bundled model draws), emoji200 or emoji
seeds=3               pictures a pair
limit=                at most so many pairs a split              (all)
steps=50 guidance_scale= sampler=ddim batch_size=16
against=MODEL         instead: the loss of both on the same (image, t, noise), and whether they differ
against=FOLDER        of an earlier evaluation: all figures beside its own
sweep=guidance        instead: quality against adherence     values=1,1.5,2,3,5
sweep=steps           instead: quality against UNet passes   values=5,10,20,50   samplers=ddim,dpmpp_2m
split=train           of a sweep: train, heldout_pairs or heldout_concepts
output=DIR            for report.html, report.md, result.json (outputs/evaluation/DATE-TIME)
"""

REPRODUCE_HELP = """\
ldm reproduce IMAGE.png [key=value ...]

Makes a picture again from the settings in its file, and says whether it is the same to the bit, or else by how much it
differs, and what else does: code, weights, versions, machine.

model=                where its model is                       (bundled, or found by its hash under outputs/)
weights=ema           ema or raw, as it was drawn with         device=
init_image= mask=     if it was made from some: they are not in the file
output=DIR            keep what was drawn
"""

PACK_HELP = """\
ldm pack SOURCE OUT [size=PIXELS]

Makes shards with an index from SOURCE: a folder of images with captions in .txt files of the same name, or a .csv or
.parquet with columns for the image (path or bytes) and the caption. OUT must not exist. size= shrinks the images.
"""

INDEX_HELP = """\
ldm index TAR [TAR ...]

Checks WebDataset tars member by member and writes an index beside each.
"""

CONVERT_HELP = """\
ldm convert SOURCE OUT [key=value ...]

Writes a checkpoint folder OUT, which must not exist, from Stable Diffusion 1.x or 2.x weights: a diffusers folder, a
CompVis single file (.safetensors, or a pickle: .ckpt .pt .pth .bin), a hub id (owner/name), or the folder of an
autoencoder or a CLIP text tower alone. A pickle is read by a closed list of names: nothing in it is run, and a name
that no weights need is reported.

half=false              true: float16, half the size
prediction=             epsilon or v, where the source does not say: single files of SD 2.x
weights=ema             ema: averaged weights where the source holds both; raw: the others

  ldm convert v1-5-pruned.ckpt models/sd15 half=true
  python sample.py "a red apple" model=models/sd15
"""
