# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What can go wrong with a teacher that answers from elsewhere, by name."""

from __future__ import annotations


class TeacherUnavailable(ConnectionError):
    """No answer came from the server, after every attempt.

    The message names the address, the number of attempts and the last cause, which is
    also the ``__cause__``.

    Examples:
        >>> from torchrl_rpd.teachers.remote import TeacherUnavailable
        >>> issubclass(TeacherUnavailable, ConnectionError)
        True
    """


class TeacherMismatch(ValueError):
    """The server is not the teacher that was asked for; the message names both sides.

    Examples:
        >>> from torchrl_rpd.teachers.remote import TeacherMismatch
        >>> issubclass(TeacherMismatch, ValueError)
        True
    """


class TeacherError(RuntimeError):
    """The server answered with an error, or with something that is no answer.

    Examples:
        >>> from torchrl_rpd.teachers.remote import TeacherError
        >>> issubclass(TeacherError, RuntimeError)
        True
    """
