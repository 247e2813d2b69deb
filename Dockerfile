# The commands on CPU torch: docker build -t vecfield . && docker run --rm -v "$PWD:/work" vecfield vecfield-infer ...
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
# Torch for CPUs alone is a tenth of the size of the one with CUDA.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir /wheels/*.whl && rm -rf /wheels
RUN useradd --create-home vecfield && mkdir /work && chown vecfield /work
USER vecfield
WORKDIR /work
CMD ["vecfield-infer", "--help"]
