# The trainer as an image:
#
#     docker build --build-arg EXTRA=cuda13 --tag orpo_jax:cuda13 .
#
# EXTRA: extras of pyproject.toml, with commas between (tpu; tpu,tokamax; cuda12; cuda13); without it, for a CPU.
FROM python:3.12-slim

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY orpo_jax orpo_jax
COPY configs configs

ARG EXTRA=""
# pip only warns of an extra that does not exist, and would leave an image for CPUs.
RUN for extra in $(echo "$EXTRA" | tr , " "); do \
      grep -q "^$extra = " pyproject.toml || { echo "EXTRA: pyproject.toml has no extra $extra" >&2; exit 1; }; \
    done
RUN pip install --no-cache-dir -e ".[$EXTRA]"

# Hugging Face's files, and the tokenised data; runs are in /app/runs.
ENV HF_HOME=/cache/huggingface ORPO_JAX_CACHE=/cache/orpo_jax
# Without a shell in between, which would keep SIGTERM for itself.
ENTRYPOINT ["python", "-m", "orpo_jax.train"]
