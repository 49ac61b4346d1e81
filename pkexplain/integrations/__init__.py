"""pkexplain under the interfaces of other libraries; each module imports its library."""
