//! QEMU's monitor protocol: JSON, one value a line, one client at a time (docs/interop/qmp-spec).

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use super::{ANSWER, GREETING, VmError};
use crate::sandbox::SocketPath;

/// Largest answer that is read, in bytes.
const LIMIT: usize = 4 << 20;

/// A connection that has been greeted and may give commands.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: UnixStream,
    read: Vec<u8>,
    /// Number of the last command: an answer to an earlier one, which was given up, is passed over.
    last: u64,
    /// Version as the greeting has it.
    pub(super) version: (u64, u64, u64),
}

impl Qmp {
    /// Connects and leaves the negotiation mode.
    pub(super) async fn connect(socket: &SocketPath) -> Result<Self, VmError> {
        let unreachable = |error: io::Error| VmError::Unreachable {
            socket: socket.to_string(),
            why: error.to_string(),
        };
        let until = Instant::now() + GREETING;
        let busy = || VmError::Busy(socket.to_string());
        // With a full queue even the connection waits.
        let stream = timeout_at(until, socket.connect()).await.map_err(|_| busy())?;
        let stream = match stream {
            // Its queue is full.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(busy()),
            stream => stream.map_err(unreachable)?,
        };
        let mut qmp = Self {
            stream,
            read: Vec::new(),
            last: 0,
            version: (0, 0, 0),
        };
        let greeting = match timeout_at(until, qmp.line("greeting")).await {
            Ok(greeting) => greeting?,
            Err(_) => return Err(busy()),
        };
        let number = |part: &str| {
            greeting
                .pointer(&format!("/QMP/version/qemu/{part}"))
                .and_then(Value::as_u64)
        };
        let (Some(major), Some(minor), Some(micro)) = (number("major"), number("minor"), number("micro"))
        else {
            return Err(nonsense("greeting", &greeting.to_string()));
        };
        qmp.version = (major, minor, micro);
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Gives a command and waits for its answer.
    pub(super) async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, VmError> {
        self.execute_within(command, arguments, ANSWER, None).await
    }

    /// Gives a command, with a descriptor if it takes one.
    pub(super) async fn execute_within(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Value, VmError> {
        let until = Instant::now() + limit;
        let late = |_| nonsense(command, &format!("no answer within {} s", limit.as_secs()));
        self.last += 1;
        let id = self.last;
        let text = format!(
            "{}\n",
            json!({"execute": command, "arguments": arguments, "id": id})
        );
        let sent = timeout_at(until, self.send(text.as_bytes(), descriptor))
            .await
            .map_err(late)?;
        sent.map_err(|error| nonsense(command, &error.to_string()))?;
        loop {
            let mut answer = timeout_at(until, self.line(command)).await.map_err(late)??;
            if answer
                .get("id")
                .and_then(Value::as_u64)
                .is_some_and(|other| other < id)
            {
                continue;
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let words = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("an error without words");
                return Err(VmError::Refused {
                    request: command.to_owned(),
                    answer: words.to_owned(),
                });
            }
            if answer.get("event").is_none() {
                return Err(nonsense(command, &answer.to_string()));
            }
        }
    }

    async fn send(&self, text: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut left = text;
        let mut descriptor = descriptor;
        while !left.is_empty() {
            self.stream.writable().await?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                send_once(self.stream.as_fd(), left, descriptor)
            });
            match sent {
                Ok(count) => {
                    left = left.get(count..).unwrap_or_default();
                    descriptor = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next line, as JSON.
    async fn line(&mut self, request: &str) -> Result<Value, VmError> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.read.drain(..=end).collect();
                let parsed = serde_json::from_slice(&line);
                return parsed.map_err(|_| nonsense(request, &excerpt(&line)));
            }
            if self.read.len() > LIMIT {
                return Err(nonsense(request, "a line without an end"));
            }
            self.more(request).await?;
        }
    }

    async fn more(&mut self, request: &str) -> Result<(), VmError> {
        let failed = |error: io::Error| nonsense(request, &error.to_string());
        self.stream.readable().await.map_err(failed)?;
        match self.stream.try_read_buf(&mut self.read) {
            Ok(0) => Err(nonsense(request, "the monitor closed the connection")),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(failed(error)),
        }
    }

    pub(super) fn duplicate(&self) -> Option<OwnedFd> {
        self.stream.as_fd().try_clone_to_owned().ok()
    }
}

fn send_once(socket: BorrowedFd<'_>, text: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    if !descriptors.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    Ok(sendmsg(
        socket,
        &[io::IoSlice::new(text)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?)
}

pub(super) fn nonsense(request: &str, answer: &str) -> VmError {
    VmError::Answer {
        request: request.to_owned(),
        answer: answer.to_owned(),
    }
}

/// The beginning of something that is not JSON, for a message.
fn excerpt(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes).chars().take(80).collect();
    format!("not JSON: {:?}", text.trim_end())
}
