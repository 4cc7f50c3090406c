# vitcomposer with the tested set of packages. PyTorch's wheels bring CUDA; the machine brings NVIDIA's driver and container toolkit.
#   docker build --build-arg UID=$(id -u) -t vitcomposer .
#   docker run --rm --gpus all --shm-size=16g -v "$PWD":/mine vitcomposer vitcomposer train photos.yaml
FROM python:3.13-slim
# make for the set-up; a C++ compiler for run.compile=true, whose kernels are built where they run
RUN apt-get update && apt-get install --yes --no-install-recommends make g++ && rm -rf /var/lib/apt/lists/*
ARG UID=1000
RUN useradd --create-home --uid $UID vitcomposer && install --directory --owner $UID /vitcomposer /mine
USER $UID
COPY --chown=$UID . /vitcomposer
RUN make -C /vitcomposer setup && rm -rf ~/.cache
ENV PATH=/vitcomposer/.venv/bin:$PATH
WORKDIR /mine
CMD ["vitcomposer", "doctor"]
