# polyclip on an NVIDIA GPU: docker build -f docker/gpu.Dockerfile -t polyclip:gpu . && docker run --gpus all …
# torch brings its own CUDA libraries; the host needs only the driver and the NVIDIA container toolkit.
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 10001 polyclip \
 && mkdir /data && chown polyclip /data
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY backbone backbone
COPY adapters_store adapters_store
COPY indexer indexer
COPY training training
COPY service service
COPY demo demo
# faiss-gpu and faiss-cpu both provide the module faiss: exactly one of them may be installed.
RUN grep -v '^faiss-cpu' constraints.txt > constraints-gpu.txt \
 && pip install --no-cache-dir --constraint constraints-gpu.txt ".[gpu,postgres]"

USER polyclip
WORKDIR /data
ENV POLYCLIP_DATA=/data POLYCLIP_DEVICE=cuda
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["polyclip", "serve", "--host", "0.0.0.0", "--port", "8000"]
