# The commands on CPU torch: docker build -t vecfield . && docker run --rm -v "$PWD:/work" vecfield vecfield-infer ...
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
# The versions that the tests ran on; torch for CPUs alone (2.13.0+cpu goes before 2.13.0) is a tenth of that with CUDA.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    --constraint /wheels/constraints.txt /wheels/*.whl && rm -rf /wheels
RUN useradd --create-home vecfield && mkdir /work && chown vecfield /work
USER vecfield
WORKDIR /work
CMD ["vecfield-infer", "--help"]
