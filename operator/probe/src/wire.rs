//! What a tracing child tells its parent: each step before it is taken, and how it ended. A record has a fixed size and
//! is written at once, so that telling costs well below a microsecond while the target stands still.

use std::fs::File;
use std::io::Write;
use std::time::Instant;

use crate::observation::{Step, Subject};
use crate::sys::Errno;

/// Bytes of a message.
const SIZE: usize = 24;

/// A message of the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// To what something is done.
    pub subject: Subject,
    /// What.
    pub step: Step,
    /// Process.
    pub pid: i32,
    /// Thread.
    pub tid: i32,
    /// `None`: it is about to be done. Otherwise how it ended.
    pub result: Option<Result<i64, Errno>>,
    /// Microseconds that it took.
    pub micros: u32,
}

impl Message {
    fn encode(&self) -> [u8; SIZE] {
        let (kind, value) = match self.result {
            None => (0, 0),
            Some(Ok(value)) => (1, value),
            Some(Err(errno)) => (2, i64::from(errno)),
        };
        let subject = match self.subject {
            Subject::Control => 0,
            Subject::Own => 1,
            Subject::Target => 2,
            Subject::Canary => 3,
        };
        // A value never needs more than 32 bits: counts, sizes and microseconds.
        let value = i32::try_from(value).unwrap_or(i32::MAX);
        let mut bytes = [0; SIZE];
        bytes[0] = kind;
        bytes[1] = subject;
        bytes[2] = self.step as u8;
        bytes[4..8].copy_from_slice(&self.pid.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.tid.to_ne_bytes());
        bytes[12..16].copy_from_slice(&value.to_ne_bytes());
        bytes[16..20].copy_from_slice(&self.micros.to_ne_bytes());
        bytes
    }

    /// `None` for bytes that are no message.
    fn decode(bytes: &[u8; SIZE]) -> Option<Self> {
        let [
            kind,
            subject,
            step,
            _,
            p0,
            p1,
            p2,
            p3,
            t0,
            t1,
            t2,
            t3,
            v0,
            v1,
            v2,
            v3,
            m0,
            m1,
            m2,
            m3,
            ..,
        ] = *bytes;
        let value = i32::from_ne_bytes([v0, v1, v2, v3]);
        Some(Self {
            subject: match subject {
                0 => Subject::Control,
                1 => Subject::Own,
                2 => Subject::Target,
                3 => Subject::Canary,
                _ => return None,
            },
            step: *Step::ALL.get(usize::from(step))?,
            pid: i32::from_ne_bytes([p0, p1, p2, p3]),
            tid: i32::from_ne_bytes([t0, t1, t2, t3]),
            result: match kind {
                0 => None,
                1 => Some(Ok(i64::from(value))),
                2 => Some(Err(value)),
                _ => return None,
            },
            micros: u32::from_ne_bytes([m0, m1, m2, m3]),
        })
    }
}

/// Cuts a stream of bytes into messages.
#[derive(Debug, Default)]
pub struct Decoder(Vec<u8>);

impl Decoder {
    /// Takes what has come, and gives every message that is complete.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Message> {
        self.0.extend_from_slice(bytes);
        let (messages, rest) = self.0.as_chunks::<SIZE>();
        let messages = messages.iter().filter_map(Message::decode).collect();
        self.0 = rest.to_vec();
        messages
    }
}

/// The child's end.
pub struct Teller<'a> {
    out: &'a mut File,
    subject: Subject,
    /// Process that is being looked at.
    pub pid: i32,
    /// Thread that is being looked at.
    pub tid: i32,
}

impl<'a> Teller<'a> {
    /// Tells about one subject.
    pub fn new(out: &'a mut File, subject: Subject, pid: i32) -> Self {
        Self {
            out,
            subject,
            pid,
            tid: pid,
        }
    }

    /// Announces a step, takes it, and tells how it ended.
    ///
    /// # Errors
    /// What the step answered.
    pub fn step(&mut self, step: Step, take: impl FnOnce() -> Result<i64, Errno>) -> Result<i64, Errno> {
        self.tell(step, None, 0);
        let started = Instant::now();
        let result = take();
        let micros = u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX);
        self.tell(step, Some(result), micros);
        result
    }

    fn tell(&mut self, step: Step, result: Option<Result<i64, Errno>>, micros: u32) {
        let message = Message {
            subject: self.subject,
            step,
            pid: self.pid,
            tid: self.tid,
            result,
            micros,
        };
        // A parent that is gone is no reason to leave the target stopped: go on.
        let _ = self.out.write_all(&message.encode());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(step: Step, result: Option<Result<i64, Errno>>) -> Message {
        Message {
            subject: Subject::Target,
            step,
            pid: 4_194_303,
            tid: 7,
            result,
            micros: 12,
        }
    }

    #[test]
    fn every_step_survives_the_pipe() {
        for step in Step::ALL {
            for result in [None, Some(Ok(5)), Some(Err(libc::EPERM))] {
                let sent = message(step, result);
                assert_eq!(Message::decode(&sent.encode()), Some(sent));
            }
        }
    }

    #[test]
    fn messages_are_found_again_wherever_the_stream_is_cut() {
        let sent = [message(Step::Seize, None), message(Step::Seize, Some(Ok(0)))];
        let stream: Vec<u8> = sent.iter().flat_map(Message::encode).collect();
        for cut in 0..stream.len() {
            let mut decoder = Decoder::default();
            let mut got = decoder.feed(&stream[..cut]);
            got.extend(decoder.feed(&stream[cut..]));
            assert_eq!(got, sent);
        }
    }

    #[test]
    fn the_order_of_the_steps_is_their_number() {
        for (number, step) in Step::ALL.into_iter().enumerate() {
            assert_eq!(step as usize, number);
        }
    }
}
