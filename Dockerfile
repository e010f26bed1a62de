# The trainer as an image:
#
#     docker build --build-arg EXTRA=cuda13 --tag orpo_jax:cuda13 .
#     docker build --build-arg EXTRA=tpu --build-arg RUN_AS=root --tag orpo_jax:tpu .
#
# EXTRA: tpu, cuda13, cuda12, or none for a CPU. RUN_AS: root where the devices belong to root, as on TPU VMs.
FROM python:3.12-slim

ENV HF_HOME=/cache/huggingface ORPO_JAX_CACHE=/cache/orpo_jax
RUN useradd --create-home trainer && mkdir -p /cache /app/runs && chown trainer: /cache /app/runs
WORKDIR /app

COPY pyproject.toml README.md LICENSE ./
COPY orpo_jax orpo_jax
COPY configs configs

# pip only warns of an extra that does not exist, and would leave an image for CPUs.
ARG EXTRA=none
RUN case "$EXTRA" in \
      none) pip install --no-cache-dir -e . ;; \
      tpu|cuda13|cuda12) pip install --no-cache-dir -e ".[$EXTRA]" ;; \
      *) echo "EXTRA: must be tpu, cuda13, cuda12 or none, got $EXTRA" >&2; exit 1 ;; \
    esac

VOLUME ["/cache", "/app/runs"]
ARG RUN_AS=trainer
USER ${RUN_AS}
# Without a shell in between, which would keep SIGTERM for itself.
ENTRYPOINT ["python", "-m", "orpo_jax.train"]
