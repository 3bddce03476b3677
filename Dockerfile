# Both images. Another build context may take the place of the stage `build`: a folder with the three programs
# in out/, for example  --build-context build=FOLDER.

FROM rust:1-slim-trixie AS build
WORKDIR /source
COPY . .
# The target's name is the host's, and the programs are linked statically: .cargo/config.toml.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/source/target \
    cargo build --release --locked --package podcheckpoint-controller --package podcheckpoint-agent \
       --package podcheckpoint-probe \
    && mkdir -p /out \
    && cp target/*/release/podcheckpoint-controller target/*/release/podcheckpoint-agent \
       target/*/release/podcheckpoint-probe /out/

FROM scratch AS controller
LABEL org.opencontainers.image.title="podcheckpoint-controller" \
      org.opencontainers.image.description="Reconciles PodCheckpoints: binds them to nodes, launches agents, sums up" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out/podcheckpoint-controller /podcheckpoint-controller
USER 65532:65532
ENTRYPOINT ["/podcheckpoint-controller"]

FROM scratch AS agent
LABEL org.opencontainers.image.title="podcheckpoint-agent" \
      org.opencontainers.image.description="Takes checkpoints of the pods of one node" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out/podcheckpoint-agent /out/podcheckpoint-probe /
USER 0:0
ENTRYPOINT ["/podcheckpoint-agent"]
