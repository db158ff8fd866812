# polyclip on the CPU: docker build -f docker/cpu.Dockerfile -t polyclip .
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
RUN pip install --no-cache-dir --constraint constraints.txt ".[cpu,postgres]"

USER polyclip
WORKDIR /data
ENV POLYCLIP_DATA=/data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["polyclip", "serve", "--host", "0.0.0.0", "--port", "8000"]
