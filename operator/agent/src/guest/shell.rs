//! A shell at the other end of a byte stream that cannot be trusted: a terminal echoes, a prompt comes in between, and
//! whoever answers may be no shell at all.
//!
//! Each command ends by printing a word that does not stand in the command itself, so that its echo is not taken for its
//! end. Commands are short, since a line editor cuts long lines; files are sent as they are, and checked by their hash.

use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// How long whoever is at the other end may take to show that it is a shell.
pub const GREETING: Duration = Duration::from_millis(1500);
/// A command's output beyond this is not read.
const OUTPUT: usize = 4 << 20;
/// How much of a file is taken at once.
const CHUNK: usize = 64 << 10;

/// The conversation failed.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The stream broke.
    #[error("the stream broke")]
    Stream(#[from] std::io::Error),
    /// The other end closed it.
    #[error("the other end closed the stream{}", after(.said))]
    Ended {
        /// The last that it said.
        said: String,
    },
    /// Nobody there acts like a shell.
    #[error("no shell answers there within {} ms{}", GREETING.as_millis(), after(.said))]
    NoShell {
        /// What came instead.
        said: String,
    },
    /// A command said more than it may.
    #[error("a command in the guest printed more than {OUTPUT} bytes")]
    TooMuch,
    /// What arrived is not what was sent.
    #[error("what arrived in the guest is not what was sent: its SHA-256 is {arrived:?}")]
    Damaged {
        /// The hash in the guest.
        arrived: String,
    },
    /// A file has another length than it should have.
    #[error("{path} in the guest is not {size} bytes long any more")]
    Length {
        /// The file.
        path: String,
        /// How long it was.
        size: u64,
    },
    /// A command that must succeed did not.
    #[error("in the guest, {what} ended with {status}{}", after(.said))]
    Failed {
        /// What was to be done.
        what: &'static str,
        /// Exit status.
        status: u32,
        /// What it printed.
        said: String,
    },
}

fn after(said: &str) -> String {
    if said.is_empty() {
        return String::new();
    }
    format!("; it said {said:?}")
}

/// What a command printed, and its exit status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Both streams as the terminal showed them.
    pub text: String,
    /// Exit status.
    pub status: u32,
}

/// A shell that has answered.
#[derive(Debug)]
pub struct Shell<S> {
    stream: S,
    /// Read, but not used yet.
    pending: Vec<u8>,
    /// What this conversation's words begin with: a serial port may still hold those of an earlier one.
    name: String,
    number: u32,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Shell<S> {
    /// Makes sure that there is a shell, and that its terminal changes nothing.
    ///
    /// # Errors
    /// When nothing, or something else, answers in [`GREETING`].
    pub async fn greet(stream: S) -> Result<Self, ShellError> {
        let mut shell = Self {
            stream,
            pending: Vec::new(),
            name: format!("PODCKPT{:x}", since_epoch().as_nanos()),
            number: 0,
        };
        let greeted = tokio::time::timeout(GREETING, shell.run("stty raw -echo; PS1= PS2=")).await;
        match greeted {
            Ok(Ok(_)) => Ok(shell),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ShellError::NoShell {
                said: shell.last_words(),
            }),
        }
    }

    /// Runs one short line.
    ///
    /// # Errors
    /// When the stream breaks or the output is too long; a failing command is no error.
    pub async fn run(&mut self, line: &str) -> Result<Output, ShellError> {
        let word = self.word();
        // The quotes keep the echo of this line from being taken for its end.
        let command = format!("{line}; echo \"\"{}''{} $?\n", word.0, word.1);
        self.stream.write_all(command.as_bytes()).await?;
        let text = self.until(format!("{}{} ", word.0, word.1).as_bytes()).await?;
        let status = self.until(b"\n").await?;
        let status = String::from_utf8_lossy(&status).trim().parse();
        Ok(Output {
            text: clean(&text),
            status: status.unwrap_or(u32::MAX),
        })
    }

    /// Runs one that must succeed.
    ///
    /// # Errors
    /// Also when it does not.
    pub async fn must(&mut self, what: &'static str, line: &str) -> Result<String, ShellError> {
        let Output { text, status } = self.run(line).await?;
        if status == 0 {
            return Ok(text);
        }
        Err(ShellError::Failed {
            what,
            status,
            said: shortened(&text),
        })
    }

    /// Sends a file, and checks that it has arrived whole.
    ///
    /// # Errors
    /// When it has not.
    pub async fn send(&mut self, bytes: &[u8], sha256: &str, path: &str) -> Result<(), ShellError> {
        let (begin, end) = (self.word(), self.word());
        let line = format!(
            "echo {}''{}; head -c {} > {path}; echo {}''{}\n",
            begin.0,
            begin.1,
            bytes.len(),
            end.0,
            end.1
        );
        self.stream.write_all(line.as_bytes()).await?;
        // Only now is it head that reads, and not the shell.
        self.until(format!("{}{}", begin.0, begin.1).as_bytes()).await?;
        self.stream.write_all(bytes).await?;
        self.until(format!("{}{}", end.0, end.1).as_bytes()).await?;
        let text = self.must("sha256sum", &format!("sha256sum {path}")).await?;
        // A prompt or the command may stand before the sum.
        let arrived = text.split_whitespace().find(|word| is_sha256(word));
        if arrived == Some(sha256) {
            return Ok(());
        }
        Err(ShellError::Damaged {
            arrived: arrived.unwrap_or_default().to_owned(),
        })
    }

    /// Takes a file of the guest and hands it on; the SHA-256 is that of what has arrived. The caller has a deadline: for
    /// a file that is shorter than it should be this waits.
    ///
    /// # Errors
    /// When the stream or the taker breaks, or the file is longer.
    pub async fn receive(
        &mut self,
        path: &str,
        size: u64,
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Result<String, ShellError> {
        let (begin, end) = (self.word(), self.word());
        let line = format!(
            "echo {}''{}; head -c {size} {path}; echo {}''{}\n",
            begin.0, begin.1, end.0, end.1
        );
        self.stream.write_all(line.as_bytes()).await?;
        self.until(format!("{}{}\n", begin.0, begin.1).as_bytes()).await?;
        let (mut hash, mut left) = (Sha256::new(), size);
        // What is read at once is what there is capacity for.
        self.pending.reserve(CHUNK);
        while left > 0 {
            if self.pending.is_empty() && self.stream.read_buf(&mut self.pending).await? == 0 {
                return Err(ShellError::Ended { said: String::new() });
            }
            let count = self
                .pending
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            let part: Vec<u8> = self.pending.drain(..count).collect();
            hash.update(&part);
            to.write_all(&part).await?;
            left -= count as u64;
        }
        let rest = self.until(format!("{}{}\n", end.0, end.1).as_bytes()).await?;
        if rest.is_empty() {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        Err(ShellError::Length {
            path: path.to_owned(),
            size,
        })
    }

    /// Ends the shell, so that its terminal is gone in the guest too.
    pub async fn leave(mut self) {
        let _ = self.stream.write_all(b"stty sane; exit\n").await;
        let _ = self.stream.shutdown().await;
    }

    /// A word that nobody else says, in two halves.
    fn word(&mut self) -> (String, String) {
        self.number += 1;
        (self.name.clone(), format!("END{}", self.number))
    }

    /// Reads up to a mark and gives what stood before it.
    async fn until(&mut self, mark: &[u8]) -> Result<Vec<u8>, ShellError> {
        let mut searched = 0;
        loop {
            let from = searched.min(self.pending.len());
            let rest = self.pending.get(from..).unwrap_or_default();
            if let Some(found) = rest.windows(mark.len()).position(|window| window == mark) {
                let mut before: Vec<u8> = self.pending.drain(..from + found + mark.len()).collect();
                before.truncate(from + found);
                return Ok(before);
            }
            if self.pending.len() > OUTPUT {
                return Err(ShellError::TooMuch);
            }
            searched = self.pending.len().saturating_sub(mark.len());
            if self.stream.read_buf(&mut self.pending).await? == 0 {
                return Err(ShellError::Ended {
                    said: self.last_words(),
                });
            }
        }
    }

    fn last_words(&self) -> String {
        shortened(&clean(&self.pending))
    }
}

/// Whether a word is such a sum: the guest shows more than that.
pub(super) fn is_sha256(word: &str) -> bool {
    word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn since_epoch() -> Duration {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default()
}

/// Terminals put a carriage return before each line's end, and line editors ask where the cursor is.
fn clean(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.replace("\u{1b}[6n", "").replace('\r', "")
}

/// What may stand in a message: the guest's words, printable, and not many of them.
fn shortened(text: &str) -> String {
    let printable = text.trim().chars().filter(|c| !c.is_control() || *c == '\n');
    printable.take(120).collect()
}
