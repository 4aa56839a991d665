# The course on a CPU, for one person or for a JupyterHub. Everything is fetched while the image is built: a container
# needs no network.
#   docker build -t llmcourse .
#   docker run --rm -p 127.0.0.1:8888:8888 -v "$PWD/mine:/home/learner/course" llmcourse
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 learner \
 && mkdir -p /opt/llmcourse /srv/llmcourse \
 && chown learner /opt/llmcourse /srv/llmcourse
COPY --chown=learner . /opt/llmcourse
USER learner
WORKDIR /opt/llmcourse

ENV PATH=/opt/llmcourse/.venv/bin:$PATH LLMCOURSE_HOME=/srv/llmcourse PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1
# the same environment as `make lab` has, with PyTorch for the CPU, then models and texts, compared with their digests
RUN python tools/setup_env.py --extra lab \
 && llmcourse data --fetch all \
 && llmcourse data --verify
# from here on nothing asks a network, and several people can read the cache without waiting for each other
ENV HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2

WORKDIR /home/learner
EXPOSE 8888
# a folder of one's own is filled once; what is in it already is left alone. The address has a token, which the log says
CMD ["sh", "-c", "[ -e course/nbs ] || llmcourse start course; exec jupyter lab --ip=0.0.0.0 --no-browser course/nbs/index.ipynb"]
